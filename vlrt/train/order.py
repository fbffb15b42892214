"""Which questions make up which batch: by seed and place alone, so that a run that goes on reads what it would have.

All processes share one order: in each step they take neighbouring batches of it, as one process with larger ones would.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from vlrt.errors import ConfigError
from vlrt.train.data import Batch, VideoQuestions, loader
from vlrt.train.settings import Settings
from vlrt.train.sharding import processes, total
from vlrt.train.triplets import Triplet


def batches(
    questions: VideoQuestions, settings: Settings, step: int, curriculum: "Curriculum | None"
) -> Iterator[Batch]:
    """Yield this process's batches without end, from the one that optimizer step `step` begins with.

    Whatever the curriculum learns of their answers, before the batch after them is drawn, decides about that one, also
    where workers had begun to read others: those are forgotten.
    """
    number = step * settings.accumulation
    while True:
        level = curriculum and curriculum.newest
        order = Order(len(questions), settings.batch_size, settings.seed, number, *processes(), curriculum)
        for batch in loader(questions, settings.batch_size, sampler=order, num_workers=settings.workers):
            number += 1
            yield batch
            if curriculum is not None and curriculum.newest != level:
                break


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


class Curriculum:
    """Which rows are asked: at first those of the lowest level, in the end those of all.

    The next level is added after an equal share of the batches; or, where `exact` is given, once that share of the rows
    of the newest level is answered right. Rows count by how lately they were asked.

    Attributes:
        places: of each row, the place of its level among all levels, from 0; rows without a level have 0.
        num_levels: levels that there are.
        num_batches: after how many batches all levels are asked, where that goes by the clock.
        exact: share of right answers that adds a level; None: levels are added by the clock.
        newest: the place of the newest level that is asked, where that goes by the answers.
    """

    MEMORY = 128  # rows, after which one counts 1/e of what it counted
    MIN_ROWS = 64  # that must have been asked before they tell anything

    def __init__(self, levels: Sequence[object], num_batches: int, exact: float | None) -> None:
        self._known = sorted({level for level in levels if isinstance(level, int | float)})
        self.places = tuple(self._place(level) for level in levels)
        self.num_levels, self.num_batches, self.exact = len(self._known), num_batches, exact
        self.newest = 0 if exact is not None else self.num_levels - 1
        self._seen = self._right = 0.0  # rows of the newest level

    @classmethod
    def of(cls, rows: Sequence[Triplet], settings: Settings) -> "Curriculum":
        """Return the curriculum of a run over rows, whose metadata tell their levels.

        Raises:
            ConfigError: no row has a level.
        """
        levels = [row.metadata.get(settings.curriculum) for row in rows]
        if not any(isinstance(level, int | float) for level in levels):
            raise ConfigError(
                f"curriculum is {settings.curriculum!r}; accepted: a name in the rows' metadata that has numbers"
            )
        batches = round(settings.curriculum_share * settings.steps) * settings.accumulation
        return cls(levels, batches, settings.curriculum_exact)

    def highest(self, batch: int) -> int:
        """Return the highest place that is asked in a batch."""
        if self.exact is not None or batch >= self.num_batches:
            return self.newest
        return batch * self.num_levels // self.num_batches

    def learn(self, levels: Sequence[object], right: Tensor) -> None:
        """Take note of which rows [B] of a step were answered right; all processes' steps count, all must call this."""
        if self.exact is None:
            return
        of_newest = torch.tensor([self._place(level) == self.newest for level in levels], device=right.device)
        seen, correct = total(torch.stack([of_newest.sum(), (of_newest & right).sum()]).double()).tolist()
        kept = (1 - 1 / self.MEMORY) ** seen
        self._seen, self._right = kept * self._seen + seen, kept * self._right + correct
        enough = self._seen >= self.MIN_ROWS and self._right >= self.exact * self._seen
        if enough and self.newest < self.num_levels - 1:
            self.newest += 1
            self._seen = self._right = 0.0

    @property
    def state(self) -> Tensor:
        """What a run goes on from, [3] float64."""
        return torch.tensor([self.newest, self._seen, self._right], dtype=torch.float64)

    @state.setter
    def state(self, kept: Tensor) -> None:
        newest, self._seen, self._right = kept.tolist()
        self.newest = int(newest)

    def _place(self, level: object) -> int:
        return self._known.index(level) if isinstance(level, int | float) else 0


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
