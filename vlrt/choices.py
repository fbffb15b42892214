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
    their rows of the output head are read. A branch is fed up to its last fork in one pass, so that choices whose forks
    lie on one branch take one pass, others one per branch. The results add up to one. They are not the model's free
    odds of whole choices: a word that no other choice could have there costs nothing.

    Args:
        choices: token ids of each, ending in a token that ends the answer, so that none begins another.
        hidden: [1, C], the state that predicts the first token.
        stepper: the sequence; it is left as it was.
        row_logits: logits of the given ids alone.
    """
    scores, fed = [0.0] * len(choices), 0
    todo = [(list(range(len(choices))), 0)]  # choices still to be told apart, and how many tokens of theirs are fed
    while todo:
        members, depth = todo.pop()
        if fed > depth:
            stepper.rewind(fed - depth)
        branch, forks = _branch(choices, members, depth)
        states = stepper.feed_tokens(branch) if branch else None
        fed = depth + len(branch)
        for at, groups in forks:
            state = hidden if states is None or at == 0 else states[at - 1 : at]
            gains = _log_softmax(row_logits(state, np.array(list(groups), np.int64)))
            for group, gain in zip(groups.values(), gains, strict=True):
                for member in group:
                    scores[member] += float(gain)
            larger = [group for group in groups.values() if len(group) > 1]
            todo += [(group, depth + at) for group in larger[1:]]
    if fed:
        stepper.rewind(fed)
    return scores


def _branch(
    choices: Sequence[Sequence[int]], members: list[int], depth: int
) -> tuple[list[int], list[tuple[int, dict[int, list[int]]]]]:
    """Follow choices from a depth on, at every fork the first group of two or more.

    Returns:
        The tokens up to the last fork; and the forks: how many of those tokens stand before it, and the choices that go
        on with each token there.
    """
    branch: list[int] = []
    forks = []
    while len(members) > 1:
        branch += _shared([choices[member][depth + len(branch) :] for member in members])
        groups: dict[int, list[int]] = {}
        for member in members:
            groups.setdefault(choices[member][depth + len(branch)], []).append(member)
        forks.append((len(branch), groups))
        members = next((group for group in groups.values() if len(group) > 1), [])
    return branch, forks


def _shared(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return what sequences begin with in common."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result
