"""Which questions make up which batch: by seed and place alone, so that a run that goes on reads what it would have.

All processes share one order: in each step they take neighbouring batches of it, as one process with larger ones would.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from vlrt.train.data import Batch, VideoQuestions, loader
from vlrt.train.settings import Settings
from vlrt.train.sharding import processes


def batches(questions: VideoQuestions, settings: Settings, step: int) -> Iterator[Batch]:
    """Yield this process's batches without end, from the one that optimizer step `step` begins with."""
    order = Order(len(questions), settings.batch_size, settings.seed, step * settings.accumulation, *processes())
    yield from loader(questions, settings.batch_size, sampler=order, num_workers=settings.workers)


def held_out(size: int, batch_size: int) -> tuple[list[int], int]:
    """Return the indices that this process evaluates, and how many of its batches count.

    All processes get equally many batches, since they run in step; those beyond the end do not count.
    """
    process, count = processes()
    num_batches = -(-size // batch_size)
    mine = range(process, num_batches, count)
    rounds = -(-num_batches // count)
    numbers = [*mine, *[0] * (rounds - len(mine))]
    return [i for n in numbers for i in range(n * batch_size, min(size, (n + 1) * batch_size))], len(mine)


class Order(Sampler[int]):
    """Indices without end: each epoch a permutation of its own, batches in turn over processes."""

    def __init__(self, size: int, batch_size: int, seed: int, first: int, process: int, num_processes: int) -> None:
        self._size, self._batch, self._seed, self._first = size, batch_size, seed, first
        self._process, self._processes = process, num_processes

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            start = (number * self._processes + self._process) * self._batch
            yield from (self._at(start + i) for i in range(self._batch))
            number += 1

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        return self._permutation(epoch)[offset]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._size, generator=generator).tolist()
        return self._order
