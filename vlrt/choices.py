"""Scores the given answers of a multiple-choice question from the few logits that tell them apart.

Knows token ids, logits of single rows, and how to step forward and back; no text and no model.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
Groups = dict[int, list[int]]  # choices by the token with which they go on


class Stepper(Protocol):
    """What scoring needs of a sequence."""

    def feed_apart(self, branches: Sequence[Sequence[int]]) -> list[Array]:
        """Feed each branch as if the others were not there, and take it back; return hidden states [S, C] of each."""


def log_probabilities(
    choices: Sequence[Sequence[int]],
    hidden: Array,
    stepper: Stepper,
    row_logits: Callable[[Array, NDArray[np.int64]], NDArray[np.float32]],
) -> list[float]:
    """Return the log probability of each choice, the model being allowed to say nothing but one of them.

    Choices form a tree of tokens. Where it forks, the softmax runs over the tokens at the fork alone, so that only
    their rows of the output head are read. What is fed are branches up to their last fork: none where all choices part
    at their first token. The results add up to one. They are not the model's free odds of whole choices: a word that no
    other choice could have there costs nothing.

    Args:
        choices: token ids of each, ending in a token that ends the answer, so that none begins another.
        hidden: [1, C], the state that predicts the first token.
        stepper: the sequence; it is left as it was.
        row_logits: logits of the given ids alone.
    """
    scores = [0.0] * len(choices)
    branches = _branches(choices)
    longer = [tokens for tokens, _ in branches if tokens]
    fed = iter(stepper.feed_apart(longer) if longer else [])
    for tokens, forks in branches:
        states = next(fed) if tokens else None
        for at, groups in forks:
            state = hidden if states is None or at == 0 else states[at - 1 : at]
            gains = _log_softmax(row_logits(state, np.array(list(groups), np.int64)))
            for group, gain in zip(groups.values(), gains, strict=True):
                for member in group:
                    scores[member] += float(gain)
    return scores


def _branches(choices: Sequence[Sequence[int]]) -> list[tuple[list[int], list[tuple[int, Groups]]]]:
    """Return the branches of the tree that forks lie on; each fork is one branch's.

    Returns:
        Of each branch, its tokens up to its last fork; and its forks: how many of those tokens stand before each, and
        the choices that go on with each token there.
    """
    branches = []
    todo = [(list(range(len(choices))), 0)]  # choices still to be told apart, and how many tokens are known to be alike
    while todo:
        members, depth = todo.pop()
        tokens = list(choices[members[0]][:depth])
        forks: list[tuple[int, Groups]] = []
        while len(members) > 1:
            tokens += _shared([choices[member][len(tokens) :] for member in members])
            groups: Groups = {}
            for member in members:
                groups.setdefault(choices[member][len(tokens)], []).append(member)
            forks.append((len(tokens), groups))
            members, *others = [group for group in groups.values() if len(group) > 1] or [[]]
            todo += [(group, len(tokens)) for group in others]
        branches.append((tokens, forks))
    return branches


def _shared(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return what sequences begin with in common."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result
