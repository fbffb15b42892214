"""The teacher: a slow copy of the trained weights, `w' <- d w' + (1 - d) w` after each step.

It takes the place of the weights while it runs, so that there is one model in memory, whole or divided over processes,
and one more copy of what is trained: with adapters those and the injection module alone. Knows weights, no model.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Teacher:
    """A slow copy of weights, by name."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Begin as the weights are."""
        self._weights, self._decay = weights, decay
        self.slow = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Go a step towards the weights."""
        for name, weight in self._weights.items():
            self.slow[name].mul_(self._decay).add_(weight, alpha=1 - self._decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the weights for their slow copy, in place, and back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self.slow[name])
            self.slow[name].copy_(kept)
