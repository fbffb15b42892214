"""Scores the given answers of a multiple-choice question from the few logits that tell them apart.

Knows token ids, logits of single rows, and how to step forward and back; no text and no model.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any


class Stepper(Protocol):
    """What scoring needs of a sequence."""

    def feed_tokens(self, token_ids: Sequence[int]) -> Array:
        """Append tokens; return their hidden states [S, C]."""

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
    their rows of the output head are read; what choices share between forks is fed at once. The results add up to one.
    They are not the model's free odds of whole choices: a word that no other choice could have there costs nothing.

    Args:
        choices: token ids of each, ending in a token that ends the answer, so that none begins another.
        hidden: [1, C], the state that predicts the first token.
        stepper: the sequence; it is left as it was.
        row_logits: logits of the given ids alone.
    """
    scores, fed = [0.0] * len(choices), 0
    # What is still to be told apart: a state, the choices that go on from it, the number of their tokens before it.
    todo = [(hidden, list(range(len(choices))), 0)] if len(choices) > 1 else []
    while todo:
        hidden, members, depth = todo.pop()
        if fed > depth:
            stepper.rewind(fed - depth)
        if stem := _shared([choices[member][depth:] for member in members]):
            hidden = stepper.feed_tokens(stem)[-1:]
        fed = depth + len(stem)
        forks: dict[int, list[int]] = {}
        for member in members:
            forks.setdefault(choices[member][fed], []).append(member)
        gains = _log_softmax(row_logits(hidden, np.array(list(forks), np.int64)))
        for group, gain in zip(forks.values(), gains, strict=True):
            for member in group:
                scores[member] += float(gain)
            if len(group) > 1:
                todo.append((hidden, group, fed))
    if fed:
        stepper.rewind(fed)
    return scores


def _shared(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return what sequences begin with in common."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result
