"""Triplets to padded batches, for each of the four systems that are trained: what is fed, what is to be predicted.

Knows files, ids, positions and patches; no weights and no loss. Frames come from `frame_cache`, prompts from
`vlrt.prompt`, positions from `vlrt.positions`: training reads what inference reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlrt import config, positions, preprocess, prompt
from vlrt.errors import ConfigError, VideoError
from vlrt.train.frame_cache import FrameCache
from vlrt.train.objective import IGNORED
from vlrt.train.triplets import BadRow, Triplet, describe

System = Literal["direct", "pause", "cot", "latent"]
Range = tuple[int, int]  # first index, and the one after the last

MAX_BAD_IN_A_ROW = 32  # rows that may fail one after another before the data as a whole are refused


@dataclass(frozen=True)
class Sample:
    """One question as a model is trained on it: [prompt][latents][answer], of S tokens.

        direct  [prompt]                                        [answer, end of turn]
        pause   [prompt, latent start][pad x L][latent end]     [answer, end of turn]
        latent  the same ids; at the slots the model's own latents take the place of the pads
        cot     [prompt with Video-R1's instructions]           [<think> chain </think><answer> answer </answer>, end]

    Attributes:
        ids: [S] int64, with a pad token per video token and per slot.
        at: [3, S] int64, M-RoPE positions; all after the video are text, slots included.
        labels: [S] int64: the token's own id where it is to be predicted (from the one before it), else IGNORED.
        pixels: [n, patch_dim] float32, the video's patches as the vision tower reads them.
        grid_thw: patches of the video.
        seconds_per_temporal_patch: fractional.
        is_image: one still picture, without time.
        prompt_length: tokens before the latents or the answer, the latent start token included.
        next_position: of the text token after the prompt.
        video: range of the video's tokens.
        question: range of the question's tokens, options and instructions included.
        slots: range of the slots, empty without latents.
        answer: range of what is to be predicted, the chain of thought and the end of turn included.
        row: where all this comes from.
        bad: rows that were skipped on the way to this one.
    """

    ids: Tensor
    at: Tensor
    labels: Tensor
    pixels: Tensor
    grid_thw: tuple[int, int, int]
    seconds_per_temporal_patch: float
    is_image: bool
    prompt_length: int
    next_position: int
    video: Range
    question: Range
    slots: Range
    answer: Range
    row: Triplet
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class Batch:
    """B samples, padded on the right to S tokens.

    Attributes:
        ids: [B, S] int64, padded with 0.
        at: [B, 3, S] int64, padded with 0.
        labels: [B, S] int64, padded with IGNORED.
        valid: [B, S] bool, False where padded.
        lengths: [B] int64, tokens without padding.
        prompt_lengths: [B] int64.
        next_positions: [B] int64.
        pixels: [sum of n, patch_dim] float32, one sample after the other.
        grid_thw: [B, 3] int64.
        seconds_per_temporal_patch: [B] float64.
        is_image: [B] bool.
        video: [B, 2] int64, ranges of tokens, as `question` and `answer`.
        question: [B, 2] int64.
        slots: [B, L] int64, indices; L = 0 without latents.
        answer: [B, 2] int64.
        rows: of the B samples.
        bad: rows that were skipped.
    """

    ids: Tensor
    at: Tensor
    labels: Tensor
    valid: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    next_positions: Tensor
    pixels: Tensor
    grid_thw: Tensor
    seconds_per_temporal_patch: Tensor
    is_image: Tensor
    video: Tensor
    question: Tensor
    slots: Tensor
    answer: Tensor
    rows: tuple[Triplet, ...]
    bad: tuple[BadRow, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "bad")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class VideoQuestions(Dataset[Sample]):
    """The samples of triplets for one system. `loader` makes batches of them; its workers decode.

    A row that fails (its video does not decode, it has no chain of thought for "cot", it is too long) is replaced by
    the next one that does not, so that batches keep their size and depend on the index alone; `Sample.bad` names it.

    Args:
        rows: of `triplets.read`.
        checkpoint: a directory with a tokenizer.
        model: samples videos by `model.video`; gives ids, sizes and the number of latents.
        system: what is trained.
        cache: a directory for decoded frames.

    Raises:
        ConfigError: there are no rows, the system is unknown, or it needs latents and the model has none.
    """

    def __init__(
        self,
        rows: Sequence[Triplet],
        checkpoint: str | Path,
        model: config.Model,
        system: System,
        cache: str | Path,
    ) -> None:
        if system not in get_args(System):
            raise ConfigError(f"system is {system!r}; accepted: {', '.join(get_args(System))}")
        if system in ("pause", "latent") and model.latent is None:
            raise ConfigError(f"system is {system!r} but the model has no latents; accepted: 'direct', 'cot'")
        if not rows:
            raise ConfigError("there are no rows; accepted: one or more")
        self._rows = rows
        self._checkpoint, self._model, self._system = checkpoint, model, system
        self._cache = FrameCache(cache, model)
        self._opened: prompt.Tokenizer | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, or the next one that can be made.

        Raises:
            IndexError: there is none of that number.
            ConfigError: too many in a row cannot be made, or the cache cannot be written.
        """
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        bad: list[BadRow] = []
        for step in range(min(len(self._rows), MAX_BAD_IN_A_ROW)):
            made = self._sample(self._rows[(index + step) % len(self._rows)])
            if isinstance(made, Sample):
                return replace(made, bad=tuple(bad))
            bad.append(made)
        raise ConfigError(f"{len(bad)} rows one after another cannot be used. {describe(bad)}")

    def __getstate__(self) -> dict[str, object]:
        """Leave the tokenizer out: a compiled template cannot be pickled, so that each worker opens its own."""
        return {**self.__dict__, "_opened": None}

    def _sample(self, row: Triplet) -> Sample | BadRow:
        if self._opened is None:
            self._opened = prompt.Tokenizer.open(self._checkpoint)
        try:
            frames = self._cache.load(row.video)
        except VideoError as error:
            return BadRow(row.line, row.number, str(error))
        patches = preprocess.patchify(frames, self._model.video, self._model.vision)
        try:
            return encode(row, patches, self._opened, self._model, self._system)
        except ConfigError as error:
            return BadRow(row.line, row.number, str(error))


def loader(
    samples: VideoQuestions, batch_size: int, *, sampler: Iterable[int] | None = None, num_workers: int = 0
) -> DataLoader[Sample]:
    """Return what yields `Batch`es of samples, in the sampler's order, or in their own.

    Workers are spawned: forked from a process that had run torch and FFmpeg, some hung before their first sample.
    """
    return DataLoader(
        samples,
        batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
    )


def encode(
    row: Triplet, patches: preprocess.Patches, tokenizer: prompt.Tokenizer, model: config.Model, system: System
) -> Sample:
    """Return one triplet as the sequence that a system is trained on.

    Raises:
        ConfigError: "cot" and the row has no chain of thought, or the sequence exceeds the model's positions.
    """
    seconds = 0.0 if patches.is_image else patches.seconds_per_temporal_patch
    media = prompt.Media(patches.is_image, patches.grid_thw, seconds)
    reasoning: prompt.Reasoning = "latent" if system == "pause" else system
    built = prompt.build(tokenizer, model, row.asked, [media], reasoning=reasoning)
    (span,) = built.spans
    reasons = _slots(model) if system in ("pause", "latent") else []
    answer = _answer(row, tokenizer, system, model.tokens.eos_token_ids[0])
    ids = np.concatenate([built.ids, np.array([*reasons, *answer], np.int64)])
    if len(ids) > model.decoder.max_positions:
        raise ConfigError(
            f"takes {len(ids)} positions; accepted: at most {model.decoder.max_positions} with this model"
        )
    prompt_length, start = len(built.ids), len(ids) - len(answer)
    at, _ = positions.mrope_positions(
        ids,
        built.spans,
        tokens_per_second=model.vision.tokens_per_second,
        spatial_merge_size=model.vision.spatial_merge_size,
        rule=model.text_position_after_video,
    )
    labels = np.where(np.arange(len(ids)) >= start, ids, IGNORED)
    return Sample(
        ids=torch.from_numpy(ids),
        at=torch.from_numpy(at),
        labels=torch.from_numpy(labels),
        pixels=torch.from_numpy(patches.pixels),
        grid_thw=patches.grid_thw,
        seconds_per_temporal_patch=seconds,
        is_image=patches.is_image,
        prompt_length=prompt_length,
        next_position=int(at[0, prompt_length]),
        video=(span.start, span.start + span.num_tokens),
        question=_question(built.ids, span, model.tokens),
        slots=(prompt_length, prompt_length + max(0, len(reasons) - 1)),
        answer=(start, len(ids)),
        row=row,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Return samples of one system as a batch."""
    lengths = [len(sample.ids) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    slots = torch.stack([torch.arange(*sample.slots) for sample in samples])
    steps = torch.arange(max(lengths))
    return Batch(
        ids=pad([sample.ids for sample in samples], batch_first=True),
        at=pad([sample.at.T for sample in samples], batch_first=True).transpose(1, 2).contiguous(),
        labels=pad([sample.labels for sample in samples], batch_first=True, padding_value=IGNORED),
        valid=steps < torch.tensor(lengths)[:, None],
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor([sample.prompt_length for sample in samples]),
        next_positions=torch.tensor([sample.next_position for sample in samples]),
        pixels=torch.cat([sample.pixels for sample in samples]),
        grid_thw=torch.tensor([sample.grid_thw for sample in samples]),
        seconds_per_temporal_patch=torch.tensor(
            [sample.seconds_per_temporal_patch for sample in samples], dtype=torch.float64
        ),
        is_image=torch.tensor([sample.is_image for sample in samples]),
        video=torch.tensor([sample.video for sample in samples]),
        question=torch.tensor([sample.question for sample in samples]),
        slots=slots,
        answer=torch.tensor([sample.answer for sample in samples]),
        rows=tuple(sample.row for sample in samples),
        bad=tuple(bad for sample in samples for bad in sample.bad),
    )


def _slots(model: config.Model) -> list[int]:
    """Return what follows the latent start token: the slots, and the token that ends them."""
    assert model.latent is not None, "VideoQuestions refuses systems that the model is not made for"
    return [model.latent.pad_token_id] * model.latent.num_latents + [model.latent.end_token_id]


def _answer(row: Triplet, tokenizer: prompt.Tokenizer, system: System, end: int) -> list[int]:
    """Return the ids to predict. The answer is encoded by itself, as choices are when they are scored."""
    answer = tokenizer.encode(row.target)
    if system != "cot":
        return [*answer, end]
    if not row.cot:
        raise ConfigError("has no chain of thought (cot), which the system 'cot' is trained on")
    return [
        *tokenizer.encode(f"<think>{row.cot}</think><answer>"),
        *answer,
        *tokenizer.encode("</answer>"),
        end,
    ]


def _question(ids: np.ndarray[tuple[int], np.dtype[np.int64]], span: prompt.Span, tokens: config.Tokens) -> Range:
    """Return the range of the question in a prompt: from the video's end to the end of the user's turn."""
    start = span.start + span.num_tokens
    start += bool(ids[start] == tokens.vision_end_token_id)
    ends = np.flatnonzero(np.isin(ids[start:], tokens.eos_token_ids))
    return start, start + int(ends[0]) if len(ends) else len(ids)
