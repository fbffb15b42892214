"""CUDA graphs: a function of tensors, recorded once per shape and replayed without the host's work.

What is replayed reads the inputs of the recording, so that they are copied there first, and the result is copied out:
the next replay writes over it. Knows no model.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]


class Captured:
    """A recorded call.

    Args:
        function: of tensors on one device, launching the same kernels whatever is in them.
        given: its inputs, whose shapes are kept. What the function writes to beside its result is written three times.
    """

    def __init__(self, function: Function, given: tuple[Tensor, ...]) -> None:
        self._given = tuple(x.clone() for x in given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, allocates workspaces, chooses algorithms: none of it may be recorded
                function(*self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = function(*self._given)

    def __call__(self, *given: Tensor) -> Tensor:
        """Return what the function would."""
        for mine, x in zip(self._given, given, strict=True):
            mine.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._result.clone()


class LastUsed:
    """The recordings of the keys that were asked for last; a key is recorded when it is asked for again.

    Args:
        most: recordings that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, key: Hashable, function: Function, given: tuple[Tensor, ...]) -> Tensor:
        """Return what the function makes of its inputs, whose shapes the key tells."""
        known = key in self._kept
        captured = self._kept.pop(key, None)
        if known and captured is None:
            captured = Captured(function, given)
        self._kept[key] = captured
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return function(*given) if captured is None else captured(*given)
