"""Scores the given answers of a multiple-choice question from the few logits that tell them apart.

Knows token ids, logits of single rows, and how to step forward and back; no text and no model.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any


class Stepper(Protocol):
    """What scoring needs of a sequence."""

    def feed_token(self, token_id: int) -> Array:
        """Append a token; return its hidden state [1, C]."""

    def rewind(self, count: int) -> None:
        """Take the last `count` positions back."""


def log_probabilities(
    choices: Sequence[Sequence[int]],
    hidden: Array,
    stepper: Stepper,
    row_logits: Callable[[Array, NDArray[np.int64]], NDArray[np.float32]],
) -> list[float]:
    """Return the log probability of each choice, the model being allowed to say nothing but one of them.

    Choices form a tree of tokens. Where it forks, the softmax runs over the tokens at the fork alone, so that only
    their rows of the output head are read; where it does not, nothing is computed. The results add up to one.

    Args:
        choices: token ids of each, ending in a token that ends the answer, so that none begins another.
        hidden: [1, C], the state that predicts the first token.
        stepper: the sequence; it is left as it was.
        row_logits: logits of the given ids alone.
    """
    scores = [0.0] * len(choices)

    def descend(hidden: Array, members: list[int], depth: int) -> None:
        forks: dict[int, list[int]] = {}
        for member in members:
            forks.setdefault(choices[member][depth], []).append(member)
        ids = np.array(list(forks), np.int64)
        gains = _log_softmax(row_logits(hidden, ids)) if len(ids) > 1 else np.zeros(1)
        for (token_id, group), gain in zip(forks.items(), gains, strict=True):
            for member in group:
                scores[member] += float(gain)
            if len(group) > 1:
                descend(stepper.feed_token(token_id), group, depth + 1)
                stepper.rewind(1)

    descend(hidden, list(range(len(choices))), 0)
    return scores


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result
