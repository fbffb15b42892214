"""Which tokens of a video a model is not shown: patches that did not change, and those that matter least to a question.

Both are choices, not approximations that come for free: what they cost is measured in benches/bench_reduction.py. Knows
pixels and embeddings; no engine, no position: the tokens that are kept stand where they stood.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlrt.config import Vision
from vlrt.errors import ConfigError
from vlrt.preprocess import grid_of
from vlrt.video import Frames

STRETCH = 512  # tokens among which a question's are picked at a time: the work grows with the square of it
_ROUNDING = 1e-9  # 30 tokens times 0.1 are 3 tokens
_NO_GAIN = 1e-9  # of the largest: below it a token is a copy of those that were picked


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Reduction:
    """Which video tokens a model is not shown; as it stands, it is shown all.

    Attributes:
        unchanged: levels (0 to 255): a token is dropped where the pixels of its merged patch differ, on average, by no
            more from those of the token that was kept last at its place; 0 drops equal ones alone. None: none is.
            Temporal patches of which no token is left do not enter the vision tower: its attention never looks beyond
            one. Single tokens are dropped behind it, since their neighbours look at them.
        keep: share, above 0 and up to 1, of the tokens that are left to be kept for a question, by `related`. Below 1
            what is read of a video depends on the question: another question about it reads it anew, behind the vision
            tower, which runs once.
    """

    unchanged: float | None = None
    keep: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.unchanged is not None and not (_is_number(self.unchanged) and 0 <= self.unchanged <= 255):
            raise ConfigError(f"reduction.unchanged is {self.unchanged!r}; accepted: 0 to 255 levels, or None")
        if not (_is_number(self.keep) and 0 < self.keep <= 1):
            raise ConfigError(f"reduction.keep is {self.keep!r}; accepted: a share above 0, up to 1")

    def num_kept(self, count: int) -> int:
        """Return how many of `count` tokens are kept for a question."""
        return int(np.ceil(count * self.keep - _ROUNDING))


NONE = Reduction()


def check(reduce: Reduction | None) -> Reduction:
    """Return what a caller gave, `NONE` for None.

    Raises:
        ConfigError: it is something else.
    """
    if reduce is not None and not isinstance(reduce, Reduction):
        raise ConfigError(f"reduce is {reduce!r}; accepted: a vlrt.Reduction, or None")
    return reduce or NONE


def changed(frames: Frames, vision: Vision, tolerance: float) -> NDArray[np.bool_]:
    """Return which tokens of a video show something new, [T, P] in the order of the vision tower's output.

    Each is held against the one that was kept last at its place, not against the one before it: what changes slowly is
    kept once it has changed enough. The first temporal patch is kept whole.

    Args:
        frames: as `preprocess.resized` returns them.
        vision: patch sizes.
        tolerance: mean absolute difference, in levels, of pixels that count as the same.
    """
    total, height, width = grid_of(frames, vision)
    merge, side = vision.spatial_merge_size, vision.spatial_merge_size * vision.patch_size
    grid = (height // merge, width // merge)
    blocks = frames.data.reshape(total, vision.temporal_patch_size, grid[0], side, grid[1], side, 3)
    kept = np.ones((total, *grid), np.bool_)
    shown = blocks[0].astype(np.int16)
    for step in range(1, total):
        now = blocks[step].astype(np.int16)
        kept[step] = np.abs(now - shown).mean((0, 2, 4, 5)) > tolerance
        shown = np.where(kept[step][None, :, None, :, None, None], now, shown)
    return kept.reshape(total, -1)


def related(tokens: NDArray[np.float32], question: NDArray[np.float32], keep: float) -> NDArray[np.bool_]:
    """Return which tokens to keep for a question, [N]: those related to it that are not alike among themselves.

    CDPruner (arXiv 2506.10967): a determinantal point process with the kernel `r_i r_j cos(v_i, v_j)`, `r` being the
    mean cosine of a token and the question's token embeddings, scaled to 0 .. 1 over the video; its likeliest subset is
    sought greedily (arXiv 1709.05135). Ours: it is sought in stretches of STRETCH tokens, each of which keeps its
    share, so that the work grows with the length of a video and not with its cube; and where nothing is left but
    copies of what was picked, the most related are taken.

    Args:
        tokens: [N, C], N at least 1.
        question: [Q, C], Q at least 1, embeddings of the question's text.
        keep: share, above 0 and up to 1; N times it, rounded up, are kept.
    """
    unit, asked = _normalised(tokens), _normalised(question)
    relevance = unit @ asked.mean(0)
    relevance -= relevance.min()
    relevance = relevance / relevance.max() if relevance.any() else relevance + 1
    bounds = np.minimum(np.arange(0, len(tokens) + STRETCH, STRETCH), len(tokens))
    counts = np.diff([Reduction(keep=keep).num_kept(int(bound)) for bound in bounds])
    kept = np.zeros(len(tokens), np.bool_)
    for start, stop, count in zip(bounds[:-1], bounds[1:], counts, strict=True):
        kept[start + _diverse(unit[start:stop], relevance[start:stop], count)] = True
    return kept


def _diverse(unit: NDArray[np.float64], relevance: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return `count` indices, picked one by one so that each adds most to the determinant of the kernel among them."""
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gains = np.diag(kernel).copy()
    least = _NO_GAIN * gains.max()
    basis = np.zeros((count, len(unit)))
    picked: list[int] = []
    while len(picked) < count:
        best = int(gains.argmax())
        if not gains[best] > least:
            rest = np.setdiff1d(np.argsort(-relevance, kind="stable"), picked, assume_unique=True)
            return np.array([*picked, *rest[: count - len(picked)]], np.int64)
        done = basis[: len(picked)]
        row = (kernel[best] - done[:, best] @ done) / np.sqrt(gains[best])
        basis[len(picked)] = row
        gains -= row**2
        gains[best] = -np.inf
        picked.append(best)
    return np.array(picked, np.int64)


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return unit
