"""One question as a model is trained on it, and several of them as a batch.

Knows ids, positions and ranges; no files, no tokenizer and no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vlrt.train.objective import IGNORED
from vlrt.train.triplets import BadRow, Triplet

Range = tuple[int, int]  # first index, and the one after the last


@dataclass(frozen=True)
class Sample:
    """One question as a model is trained on it: [prompt][latents][answer], of S tokens.

        direct  [prompt]                                        [answer, end of turn]
        pause   [prompt, latent start][pad x L][latent end]     [answer, end of turn]
        latent  the same ids; at the slots the model's own latents take the place of the pads. Where the model's
                latents end on their end token, that is predicted too, and before each slot but the first that there is
                one more (a pad)
        cot     [prompt with Video-R1's instructions]           [<think> chain </think><answer> answer </answer>, end]

    Attributes:
        ids: [S] int64, with a pad token per video token and per slot.
        at: [3, S] int64, M-RoPE positions; all after the video are text, slots included.
        labels: [S] int64: the token's own id where it is to be predicted (from the one before it), else IGNORED.
        pixels: [n, patch_dim] float32, the video's patches as the vision tower reads them; none where there are tokens.
        tokens: [N, C] float32, what the tower made of them earlier; N = 0 where that is not known.
        grid_thw: patches of the video.
        seconds_per_temporal_patch: fractional.
        is_image: one still picture, without time.
        prompt_length: tokens before the latents or the answer, the latent start token included.
        next_position: of the text token after the prompt.
        video: range of the video's tokens.
        question: range of the question's tokens, options and instructions included.
        slots: range of the slots, empty without latents.
        answer: range of what is to be predicted, the chain of thought and the end of turn included.
        told_ids: [S'] int64, the prompt in which the user also tells the right answer, for a teacher; else S' = 0.
        told_at: [3, S'] int64, its positions.
        told_next: of the text token after it.
        row: where all this comes from.
        bad: rows that were skipped on the way to this one.
    """

    ids: Tensor
    at: Tensor
    labels: Tensor
    pixels: Tensor
    tokens: Tensor
    grid_thw: tuple[int, int, int]
    seconds_per_temporal_patch: float
    is_image: bool
    prompt_length: int
    next_position: int
    video: Range
    question: Range
    slots: Range
    answer: Range
    told_ids: Tensor
    told_at: Tensor
    told_next: int
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
        pixels: [sum of n, patch_dim] float32, one sample after the other, of those that are not encoded.
        tokens: [sum of N, C] float32, of those that are.
        encoded: [B] bool.
        grid_thw: [B, 3] int64.
        seconds_per_temporal_patch: [B] float64.
        is_image: [B] bool.
        video: [B, 2] int64, ranges of tokens, as `question` and `answer`.
        question: [B, 2] int64.
        slots: [B, L] int64, indices; L = 0 without latents.
        answer: [B, 2] int64.
        told_ids: [B, S'] int64, prompts that tell the answer, padded with 0; S' = 0 without a teacher.
        told_at: [B, 3, S'] int64.
        told_lengths: [B] int64.
        told_next: [B] int64.
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
    tokens: Tensor
    encoded: Tensor
    grid_thw: Tensor
    seconds_per_temporal_patch: Tensor
    is_image: Tensor
    video: Tensor
    question: Tensor
    slots: Tensor
    answer: Tensor
    told_ids: Tensor
    told_at: Tensor
    told_lengths: Tensor
    told_next: Tensor
    rows: tuple[Triplet, ...]
    bad: tuple[BadRow, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "bad")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


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
        tokens=torch.cat([sample.tokens for sample in samples]),
        encoded=torch.tensor([len(sample.tokens) > 0 for sample in samples]),
        grid_thw=torch.tensor([sample.grid_thw for sample in samples]),
        seconds_per_temporal_patch=torch.tensor(
            [sample.seconds_per_temporal_patch for sample in samples], dtype=torch.float64
        ),
        is_image=torch.tensor([sample.is_image for sample in samples]),
        video=torch.tensor([sample.video for sample in samples]),
        question=torch.tensor([sample.question for sample in samples]),
        slots=slots,
        answer=torch.tensor([sample.answer for sample in samples]),
        told_ids=pad([sample.told_ids for sample in samples], batch_first=True),
        told_at=pad([sample.told_at.T for sample in samples], batch_first=True).transpose(1, 2).contiguous(),
        told_lengths=torch.tensor([len(sample.told_ids) for sample in samples]),
        told_next=torch.tensor([sample.told_next for sample in samples]),
        rows=tuple(sample.row for sample in samples),
        bad=tuple(bad for sample in samples for bad in sample.bad),
    )


def shorten(batch: Batch, num_latents: int) -> Batch:
    """Return the batch with the first `num_latents` slots of each sample alone, as if the model had no more.

    What stands behind them moves up, in the sequence and by its text positions.
    """
    dropped = batch.slots.shape[1] - num_latents
    if not dropped:
        return batch
    steps = torch.arange(batch.ids.shape[1] - dropped, device=batch.ids.device)
    behind = steps >= batch.slots[:, num_latents, None]  # [B, S - dropped]
    source = steps + dropped * behind
    valid = batch.valid.gather(1, source)
    at = batch.at.gather(2, source[:, None].expand(-1, 3, -1)) - dropped * (behind & valid)[:, None]
    return replace(
        batch,
        ids=batch.ids.gather(1, source),
        at=at,
        labels=batch.labels.gather(1, source),
        valid=valid,
        lengths=batch.lengths - dropped,
        slots=batch.slots[:, :num_latents],
        answer=batch.answer - dropped,
    )
