"""Which rows are trained on, when, and on which rank: one pure function of the seed.

Both trial runners, evaluation and resume ask here, so that the order of rows depends on nothing but the seed
and the size of a step:
not on the number of workers, Ray's blocks or the machine.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on one rank. `filler` says that its only row is there to keep ranks in step
    and carries no labels."""

    rows: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Order:
    """The order of `rows` training rows for steps of `per_device * accumulation * workers` rows.

    `workers` are those that a step is made for, all `world` of them by default. An elastic run that lacks
    some makes the same steps with
    more passes each, so that it goes on at the exact next row when one comes or goes.
    """

    rows: int
    per_device: int
    accumulation: int
    world: int
    seed: int
    workers: int | None = None

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * (self.workers or self.world)

    @property
    def passes_per_step(self) -> int:
        """Forward passes of one rank in a whole step."""
        return self._passes(self.rows_per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one takes what rows are left."""
        return -(-self.rows // self.rows_per_step)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes of one rank in an epoch, the same on every rank."""
        full, left = divmod(self.rows, self.rows_per_step)
        return full * self.passes_per_step + self._passes(left)

    def permutation(self, epoch: int) -> np.ndarray:
        """All row numbers in the order of this epoch, shape `[rows]`.

        RandomState is numpy's frozen generator: its stream is the same in every release, which
        `Generator.permutation` does not promise.
        """
        return np.random.RandomState([self.seed % 2**32, epoch]).permutation(self.rows)

    def step(self, epoch: int, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of `rank` in optimizer step `step` of `epoch`.

        The rows of a step are dealt to the ranks like cards, then cut into micro-batches of `per_device`. In
        the last, shorter step a
        rank may be left without a row: it then gets a filler, because ranks must take part in every
        all-reduce.
        """
        return self._deal(self.permutation(epoch), step, rank)

    def epoch(self, epoch: int, rank: int, first_step: int = 0) -> list[MicroBatch]:
        """The micro-batches of `rank` in `epoch` from `first_step` on."""
        permutation = self.permutation(epoch)
        return [
            batch
            for step in range(first_step, self.steps_per_epoch)
            for batch in self._deal(permutation, step, rank)
        ]

    def _deal(self, permutation: np.ndarray, step: int, rank: int) -> list[MicroBatch]:
        rows = permutation[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        mine = [int(row) for row in rows[rank :: self.world]]
        return [
            cut(mine, self.per_device, index, filler=int(rows[0])) for index in range(self._passes(len(rows)))
        ]

    def _passes(self, rows: int) -> int:
        return -(-rows // (self.per_device * self.world))


def cut(rows: list[int], size: int, index: int, *, filler: int) -> MicroBatch:
    """The `index`-th run of `size` rows, or a filler of one row where there is none."""
    part = tuple(rows[index * size : (index + 1) * size])
    return MicroBatch(part) if part else MicroBatch((filler,), filler=True)


def evaluation_order(rows: int, batch: int, rank: int, world: int) -> list[MicroBatch]:
    """The micro-batches of `rank` over an evaluation set in its own order, each row on one rank, the same
    number on every rank."""
    mine = list(range(rank, rows, world))
    passes = -(-rows // (batch * world))
    return [cut(mine, batch, index, filler=0) for index in range(passes)]
