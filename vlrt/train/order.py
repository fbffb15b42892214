"""Which questions make up which batch: by seed and place alone, so that a run that goes on reads what it would have.

All processes share one order: in each step they take neighbouring batches of it, as one process with larger ones would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from vlrt.errors import ConfigError
from vlrt.train.data import Batch, VideoQuestions, loader
from vlrt.train.settings import Settings
from vlrt.train.sharding import processes
from vlrt.train.triplets import Triplet


def batches(questions: VideoQuestions, settings: Settings, step: int) -> Iterator[Batch]:
    """Yield this process's batches without end, from the one that optimizer step `step` begins with."""
    first = step * settings.accumulation
    curriculum = Curriculum.of(questions.rows, settings) if settings.curriculum else None
    order = Order(len(questions), settings.batch_size, settings.seed, first, *processes(), curriculum)
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


@dataclass(frozen=True)
class Curriculum:
    """Which rows are asked at first: those of the lowest levels; later ones of all.

    Attributes:
        places: of each row, the place of its level among all levels, from 0; rows without a level have 0.
        num_levels: levels that there are.
        num_batches: after how many batches all levels are asked; each level is added after an equal share of them.
    """

    places: tuple[int, ...]
    num_levels: int
    num_batches: int

    @classmethod
    def of(cls, rows: Sequence[Triplet], settings: Settings) -> "Curriculum":
        """Return the curriculum of a run over rows, whose metadata tell their levels.

        Raises:
            ConfigError: no row has a level.
        """
        levels = [row.metadata.get(settings.curriculum) for row in rows]
        known = sorted({level for level in levels if isinstance(level, int | float)})
        if not known:
            raise ConfigError(
                f"curriculum is {settings.curriculum!r}; accepted: a name in the rows' metadata that has numbers"
            )
        places = tuple(known.index(level) if isinstance(level, int | float) else 0 for level in levels)
        batches = round(settings.curriculum_share * settings.steps) * settings.accumulation
        return cls(places, len(known), batches)

    def highest(self, batch: int) -> int:
        """Return the highest place that is asked in a batch."""
        if batch >= self.num_batches:
            return self.num_levels - 1
        return batch * self.num_levels // self.num_batches


class Order(Sampler[int]):
    """Indices without end: each epoch a permutation of its own, batches in turn over processes.

    Under a curriculum, the next row in the permutation that may be asked takes the place of one that may not yet.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        first: int,
        process: int,
        num_processes: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self._size, self._batch, self._seed, self._first = size, batch_size, seed, first
        self._process, self._processes = process, num_processes
        self._curriculum = curriculum

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            start = (number * self._processes + self._process) * self._batch
            yield from (self._at(start + i, number) for i in range(self._batch))
            number += 1

    def _at(self, place: int, batch: int) -> int:
        epoch, offset = divmod(place, self._size)
        order = self._permutation(epoch)
        if self._curriculum is not None:
            highest, places = self._curriculum.highest(batch), self._curriculum.places
            while places[order[offset]] > highest:
                offset = (offset + 1) % self._size
        return order[offset]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._size, generator=generator).tolist()
        return self._order
