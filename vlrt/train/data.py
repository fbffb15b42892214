"""Triplets to samples, for each of the four systems that are trained: what is fed, what is to be predicted.

Knows files, ids, positions and patches; no weights and no loss. Frames come from `frame_cache`, prompts from
`vlrt.prompt`, positions from `vlrt.positions`: training reads what inference reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlrt import config, positions, preprocess, prompt
from vlrt.errors import ConfigError, VideoError
from vlrt.train.batch import Batch, Range, Sample, collate
from vlrt.train.frame_cache import FrameCache
from vlrt.train.objective import IGNORED
from vlrt.train.token_cache import Encoded, TokenCache
from vlrt.train.triplets import BadRow, Triplet, describe

__all__ = ["Batch", "Sample", "System", "VideoQuestions", "collate", "encode", "loader"]

System = Literal["direct", "pause", "cot", "latent"]

TELLING = "{}\nThe right answer is: {}"  # the question as a teacher reads it
MAX_BAD_IN_A_ROW = 32  # rows that may fail one after another before the data as a whole are refused


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
        tokens: of a frozen vision tower; videos that are encoded there are not decoded.
        tells_answer: also make the prompts that a teacher reads.

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
        *,
        tokens: TokenCache | None = None,
        tells_answer: bool = False,
    ) -> None:
        if system not in get_args(System):
            raise ConfigError(f"system is {system!r}; accepted: {', '.join(get_args(System))}")
        if system in ("pause", "latent") and model.latent is None:
            raise ConfigError(f"system is {system!r} but the model has no latents; accepted: 'direct', 'cot'")
        if not rows:
            raise ConfigError("there are no rows; accepted: one or more")
        self._rows = rows
        self._checkpoint, self._model, self._system = checkpoint, model, system
        self._tells_answer = tells_answer
        self._cache, self._tokens = FrameCache(cache, model), tokens
        self._opened: prompt.Tokenizer | None = None

    @property
    def rows(self) -> Sequence[Triplet]:
        """The rows, of which sample i is made of row i where that can be used."""
        return self._rows

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
            clip: preprocess.Patches | Encoded | None = self._tokens.load(row.video) if self._tokens else None
            if clip is None:
                clip = preprocess.patchify(self._cache.load(row.video), self._model.video, self._model.vision)
        except VideoError as error:
            return BadRow(row.line, row.number, str(error))
        try:
            return encode(row, clip, self._opened, self._model, self._system, tells_answer=self._tells_answer)
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
    row: Triplet,
    clip: preprocess.Patches | Encoded,
    tokenizer: prompt.Tokenizer,
    model: config.Model,
    system: System,
    *,
    tells_answer: bool = False,
) -> Sample:
    """Return one triplet, with its video as patches or as tokens, as the sequence that a system is trained on.

    Raises:
        ConfigError: "cot" and the row has no chain of thought, or the sequence exceeds the model's positions.
    """
    seconds = 0.0 if clip.is_image else clip.seconds_per_temporal_patch
    media = prompt.Media(clip.is_image, clip.grid_thw, seconds)
    reasoning: prompt.Reasoning = "latent" if system == "pause" else system
    built = prompt.build(tokenizer, model, row.asked, [media], reasoning=reasoning)
    (span,) = built.spans
    reasons = _slots(model) if system in ("pause", "latent") else []
    answer = _answer(row, tokenizer, system, model.tokens.eos_token_ids[0])
    ids = np.concatenate([built.ids, np.array([*reasons, *answer], np.int64)])
    prompt_length, start = len(built.ids), len(ids) - len(answer)
    at, _ = _positions(ids, built.spans, model)
    told_ids, told_at, told_next = np.zeros(0, np.int64), np.zeros((3, 0), np.int64), 0
    if tells_answer:
        told = prompt.build(tokenizer, model, TELLING.format(row.asked, row.target), [media], reasoning=reasoning)
        told_ids, (told_at, told_next) = told.ids, _positions(told.ids, told.spans, model)
    longest = max(len(ids), len(told_ids) + len(reasons))
    if longest > model.decoder.max_positions:
        raise ConfigError(f"takes {longest} positions; accepted: at most {model.decoder.max_positions} with this model")
    ends = system == "latent" and model.latent is not None and model.latent.stop == "end_token"
    labels = np.where(np.arange(len(ids)) >= (prompt_length + 1 if ends else start), ids, IGNORED)
    return Sample(
        ids=torch.from_numpy(ids),
        at=torch.from_numpy(at),
        labels=torch.from_numpy(labels),
        pixels=torch.zeros(0, model.vision.patch_dim) if isinstance(clip, Encoded) else torch.from_numpy(clip.pixels),
        tokens=clip.tokens if isinstance(clip, Encoded) else torch.zeros(0, model.decoder.hidden_size),
        grid_thw=clip.grid_thw,
        seconds_per_temporal_patch=seconds,
        is_image=clip.is_image,
        prompt_length=prompt_length,
        next_position=int(at[0, prompt_length]),
        video=(span.start, span.start + span.num_tokens),
        question=_question(built.ids, span, model.tokens),
        slots=(prompt_length, prompt_length + max(0, len(reasons) - 1)),
        answer=(start, len(ids)),
        told_ids=torch.from_numpy(told_ids),
        told_at=torch.from_numpy(told_at),
        told_next=told_next,
        row=row,
    )


def _positions(ids: positions.Int64, spans: Sequence[prompt.Span], model: config.Model) -> tuple[positions.Int64, int]:
    """Return M-RoPE positions [3, S], and that of the text token that follows."""
    return positions.mrope_positions(
        ids,
        spans,
        tokens_per_second=model.vision.tokens_per_second,
        spatial_merge_size=model.vision.spatial_merge_size,
        rule=model.text_position_after_video,
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
