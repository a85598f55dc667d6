"""A position in a trial's order of training rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmtune.data.order import BatchRows, Order
from vlmtune.packed.worker_shard import WorkerShard


class RowsCursor:
    """Iterates over a trial's training rows, batch by batch, from any step on.

    The position follows from the number of steps made, so checkpoints do not store it.

    Args:
        row_numbers: the numbers, in the store, of the training rows that `order` refers to.
        order: the rows of each step.
        shard: this process's part of the rows of each step.
        first_step: the number of optimizer steps already made.
        max_steps: the number of optimizer steps of the whole trial.
    """

    def __init__(
        self, row_numbers: np.ndarray, order: Order, shard: WorkerShard, *, first_step: int, max_steps: int
    ) -> None:
        self.row_numbers, self.order, self.shard, self.max_steps = row_numbers, order, shard, max_steps
        self._steps = self._iterate_steps(first_step)
        self._step = next(self._steps, [])  # the batches that are left of the present step
        self._following = next(self._steps, [])  # the batches of the next step
        self._rows_done = 0  # rows of the present step that this process has trained on

    def next_batch(self) -> list[int]:
        """The row numbers of the next batch; empty if only other workers have rows in it."""
        return self._numbers(self._step[:1])

    def positions(self) -> list[int]:
        """The position of each row of the next batch among the rows of its step.

        A row's position does not depend on the number of workers.
        """
        rows = range(self._rows_done, self._rows_done + len(self.next_batch()))
        return [row * self.shard.world_size + self.shard.rank for row in rows]

    def rest_of_step(self) -> list[int]:
        """The row numbers of the batches that are left of the present step, the next batch included."""
        return self._numbers(self._step)

    def following_step(self) -> list[int]:
        """The row numbers of the next step, which can be read ahead."""
        return self._numbers(self._following)

    def advance(self) -> bool:
        """Move past the next batch; returns whether it was the last one of its step."""
        self._rows_done += len(self.next_batch())
        self._step = self._step[1:]
        if self._step:
            return False
        self._step, self._following, self._rows_done = self._following, next(self._steps, []), 0
        return True

    def _numbers(self, batches: list[BatchRows]) -> list[int]:
        return [int(self.row_numbers[row]) for batch in batches if not batch.filler for row in batch.rows]

    def _iterate_steps(self, step: int) -> Iterator[list[BatchRows]]:
        order = self.order
        while step < self.max_steps:
            epoch, first = divmod(step, order.steps_per_epoch)
            batches, size = order.epoch(epoch, self.shard.rank, first), order.accumulation
            count = min(order.steps_per_epoch - first, self.max_steps - step)
            yield from (batches[index * size : (index + 1) * size] for index in range(count))
            step += count
