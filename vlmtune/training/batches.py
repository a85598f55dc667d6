"""The batches of one worker: their rows in order, and the stream from which the Trainer reads them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.data.lengths import lengths_to_group, mixture_of
from vlmtune.data.order import BatchRows, Order, evaluation_order
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store

Batch = dict[str, torch.Tensor]
ROW_NUMBERS = "row_numbers"  # key of a batch: the numbers of its rows in the store, `[B]`


def order_of_rows(
    settings: Settings, args: SFTConfig, store: Store, usable_rows: np.ndarray, world_size: int
) -> Order:
    """The rows of every training step.

    Args:
        usable_rows: indices, among the rows of the training split, of those that are trained on.
        world_size: the present number of workers; an elastic run may have been started with more.
    """
    workers = settings.run.workers
    return Order(
        rows=len(usable_rows),
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        workers=settings.run.max_workers if isinstance(workers, tuple) else None,
        mixture=mixture_of(store, usable_rows, settings.data.data_weights),
        lengths=lengths_to_group(
            store, usable_rows, args.train_sampling_strategy, settings.training.max_length
        ),
    )


class BatchReader(Protocol):
    """A function that reads batches of a split, shortened to `max_length` tokens, in the given order."""

    def __call__(
        self, split: str, batches: Sequence[BatchRows], max_length: int | None
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class WorkerBatches:
    """The batches of the worker `rank`.

    Attributes:
        order: the rows of every training step, as indices of `usable_rows`.
        usable_rows: indices, among the rows of the training split, of those that are trained on.
        read: reads batches whose rows are indices among the rows of a split.
        first_step: the number of steps that a resumed run has made already.
    """

    store: Store
    order: Order
    usable_rows: np.ndarray
    rank: int
    read: BatchReader
    first_step: int = 0

    def training(self, batches: list[BatchRows], max_length: int | None) -> Iterator[Batch]:
        """Read batches of `order`, onto the CPU."""
        in_split = [
            replace(batch, rows=tuple(int(self.usable_rows[row]) for row in batch.rows)) for batch in batches
        ]
        return self._numbered(TRAIN, in_split, max_length)

    def evaluation(self, per_device: int) -> Iterator[Batch]:
        """Read this worker's part of the evaluation rows, at full length, onto the CPU."""
        rows = len(self.store.rows_of(EVAL))
        order = evaluation_order(rows, per_device, self.rank, self.order.world_size)
        return self._numbered(EVAL, order, None)

    def longest(self, count: int, max_length: int | None) -> Batch:
        """The `count` longest training rows in one batch, on the CPU."""
        tokens = self.store.column("tokens")[self.store.rows_of(TRAIN)[self.usable_rows]]
        rows = np.argsort(tokens, kind="stable")[-count:]
        return next(self.training([BatchRows(tuple(int(row) for row in rows))], max_length))

    def _numbered(self, split: str, batches: Sequence[BatchRows], max_length: int | None) -> Iterator[Batch]:
        rows = torch.from_numpy(self.store.rows_of(split))
        for batch_rows, batch in zip(batches, self.read(split, batches, max_length), strict=True):
            yield {**batch, ROW_NUMBERS: rows[list(batch_rows.rows)]}


class BatchStream(IterableDataset):  # type: ignore[type-arg]
    """The training batches of one worker. Each iteration over the stream is the next epoch.

    When a run is resumed, the Trainer skips the batches of the steps already made. These are yielded as empty
    dicts and not read.

    Args:
        timed: returns the same batches, and measures how long reading each one takes.
    """

    def __init__(
        self,
        batches: WorkerBatches,
        max_length: int | None,
        timed: Callable[[Iterator[Batch]], Iterator[Batch]],
    ) -> None:
        self.batches, self.max_length, self.timed = batches, max_length, timed
        self.epoch, self.first_step = divmod(batches.first_step, batches.order.steps_per_epoch)

    def __len__(self) -> int:
        return self.batches.order.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, first_step = self.epoch, self.first_step
        self.epoch, self.first_step = epoch + 1, 0
        order, rank = self.batches.order, self.batches.rank
        yield from ({} for _ in range(first_step * order.batches_per_step))
        yield from self.timed(self.batches.training(order.epoch(epoch, rank, first_step), self.max_length))
