"""The order in which rows are trained on, and on which rank.

Isolated and packed training, evaluation and resuming use it. The order depends only on the seed, the rows and
the number of rows in a step; not on how many workers share a step, on Ray's blocks or on the machine.
"""

from dataclasses import dataclass

import numpy as np

GROUPED_STEPS = 50  # rows of this many steps are sorted by length together


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch of one rank.

    Attributes:
        filler: the batch has one row without labels, which only keeps this rank in step with the others.
    """

    rows: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Mixture:
    """An epoch that draws a given share of its rows from each source, instead of every row once.

    An epoch has as many rows as all sources together. Each source gives its rows in an endless seeded order
    that goes through all of them before it repeats one, so that in the long run all rows of a source count
    equally.

    Attributes:
        sizes: number of rows of each source; the rows of one source follow those of the one before.
        weights: the share of each source; they need not add up to 1.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def quotas(self) -> list[int]:
        """Rows of each source in an epoch: shares rounded so that they add up to the rows in all."""
        rows, weights = (
            sum(self.sizes),
            [weight if size else 0.0 for weight, size in zip(self.weights, self.sizes, strict=True)],
        )
        exact = [rows * weight / sum(weights) for weight in weights]
        quotas = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: quotas[source] - exact[source])
        for source in by_remainder[: rows - sum(quotas)]:
            quotas[source] += 1
        return quotas

    def rows(self, epoch: int, seed: int) -> np.ndarray:
        """The rows of an epoch, by source; shape `[sum(sizes)]`."""
        first, drawn = 0, []
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas(), strict=True)):
            begin = epoch * quota
            rounds = range(begin // size, -(-(begin + quota) // size)) if size else range(0)
            stream = [
                np.random.RandomState([seed % 2**32, source, turn]).permutation(size) for turn in rounds
            ]
            if stream:
                offset = begin - rounds.start * size
                drawn.append(first + np.concatenate(stream)[offset : offset + quota])
            first += size
        return np.concatenate(drawn)


@dataclass(frozen=True)
class Order:
    """The order of `rows` training rows for steps of `per_device * accumulation * workers` rows.

    Attributes:
        per_device: number of rows in one forward pass of a rank.
        accumulation: number of batches of a rank in a step (`gradient_accumulation_steps`).
        world_size: number of ranks that run now.
        workers: number of ranks that a step was planned for; by default `world_size`. An elastic run with
            fewer ranks makes the same steps with more batches for each rank, so that it resumes at exactly
            the next row when the number of ranks changes.
        mixture: how rows are drawn from several sources; None to draw every row once an epoch.
        lengths: tokens of each row, if the rows of a step shall have similar lengths (`_group_by_length`).
    """

    rows: int
    per_device: int
    accumulation: int
    world_size: int
    seed: int
    workers: int | None = None
    mixture: Mixture | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * (self.workers or self.world_size)

    @property
    def batches_per_step(self) -> int:
        """Batches of one rank in a whole step."""
        return self._batches(self.rows_per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one takes the rows that are left."""
        return -(-self.rows // self.rows_per_step)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one rank in an epoch, the same on every rank."""
        full, left = divmod(self.rows, self.rows_per_step)
        return full * self.batches_per_step + self._batches(left)

    def permutation(self, epoch: int) -> np.ndarray:
        """The row numbers of this epoch in order, shape `[rows]`: every row once, or as `mixture` draws them.

        With `lengths`, rows of similar length follow each other.

        RandomState is numpy's frozen generator: its stream is the same in every release, which
        `Generator.permutation` does not promise.
        """
        permutation = np.random.RandomState([self.seed % 2**32, epoch]).permutation(self.rows)
        rows = permutation if self.mixture is None else self.mixture.rows(epoch, self.seed)[permutation]
        return rows if self.lengths is None else self._group_by_length(rows, epoch)

    def _group_by_length(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Sort the rows of each `GROUPED_STEPS` steps by length, and shuffle these steps.

        Transformers' LengthGroupedSampler also sorts the rows of 50 batches, but does not shuffle these. A
        last step of fewer rows stays the last one.
        """
        lengths, size = np.array(self.lengths), self.rows_per_step
        grouped = []
        for first in range(0, len(rows), GROUPED_STEPS * size):
            part = rows[first : first + GROUPED_STEPS * size]
            part = part[np.argsort(-lengths[part], kind="stable")]
            whole = len(part) // size
            shuffled = np.random.RandomState([self.seed % 2**32, epoch, first]).permutation(whole)
            grouped += [part[: whole * size].reshape(whole, size)[shuffled].ravel(), part[whole * size :]]
        return np.concatenate(grouped)

    def step(self, epoch: int, step: int, rank: int) -> list[BatchRows]:
        """The batches of `rank` in optimizer step `step` of `epoch`.

        The rows of a step go to the ranks in turn, then are cut into batches of `per_device`. In the
        last, shorter step a rank may have no row left: it gets a filler, because every rank must take part in
        every all-reduce.
        """
        return self._share(self.permutation(epoch), step, rank)

    def epoch(self, epoch: int, rank: int, first_step: int = 0) -> list[BatchRows]:
        """The batches of `rank` in `epoch` from `first_step` on."""
        permutation = self.permutation(epoch)
        return [
            batch
            for step in range(first_step, self.steps_per_epoch)
            for batch in self._share(permutation, step, rank)
        ]

    def _share(self, permutation: np.ndarray, step: int, rank: int) -> list[BatchRows]:
        rows = permutation[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        on_rank = [int(row) for row in rows[rank :: self.world_size]]
        batches = range(self._batches(len(rows)))
        return [cut(on_rank, self.per_device, index, filler=int(rows[0])) for index in batches]

    def _batches(self, rows: int) -> int:
        return -(-rows // (self.per_device * self.world_size))


def cut(rows: list[int], size: int, index: int, *, filler: int) -> BatchRows:
    """The `index`-th batch of `size` of these rows; a filler of one row if there is no such batch."""
    part = tuple(rows[index * size : (index + 1) * size])
    return BatchRows(part) if part else BatchRows((filler,), filler=True)


def evaluation_order(rows: int, batch: int, rank: int, world_size: int) -> list[BatchRows]:
    """The batches of `rank` over an evaluation set of `rows` rows, in the order of the set.

    Each row is on one rank, and every rank has the same number of batches.
    """
    on_rank = list(range(rank, rows, world_size))
    batches = -(-rows // (batch * world_size))
    return [cut(on_rank, batch, index, filler=0) for index in range(batches)]
