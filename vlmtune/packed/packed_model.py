"""`PackedModel`: the frozen base with an adapter for each row; it runs rows of several trials together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmtune.compat.trl import add_fused_lm_head
from vlmtune.data.store_meta import StoreMeta
from vlmtune.model.head import add_positions_argument
from vlmtune.model.memory import memory_shortage
from vlmtune.model.step import AcceleratedStep
from vlmtune.model.transfer import to_device
from vlmtune.packed.adapter_binding import AdapterBinding
from vlmtune.packed.length_buckets import LengthBuckets
from vlmtune.packed.loss import RowLosses, row_losses
from vlmtune.packed.packed_batch import PackedRow, bucket_rows, make_batch, packed_batches, pad_to_bucket
from vlmtune.packed.row_features import PackedVisionFeatures


@dataclass(frozen=True)
class PassResult:
    """The result of a pass: of rows that `PackedModel` runs through the base, in one or more packed batches.

    Attributes:
        rows: per-row loss and correct-token count, keyed by `id(row)`: the summed loss, and the number of
            correct predictions, scalars on the device.
        too_large: slots of rows that do not fit in memory even alone; `rows` may lack their other rows.
        shortages: for each slot in `too_large`, how much memory was needed and how much was free; empty if
            that is not known.
    """

    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    too_large: list[Any] = field(default_factory=list)
    shortages: list[str] = field(default_factory=list)


class PackedModel:
    """A frozen base in which each row of a packed batch has its own trial's adapter.

    Args:
        accelerated_step: the base with its accelerations.
        meta: what the rows of the store share.
        max_tokens: the largest number of tokens in a packed batch, padding included.
        buckets: the lengths that rows are padded to.
        features: cached outputs of the vision tower. They are dropped first when memory runs out.

    Attributes:
        adapters: connects the base's layers to the adapters of a packed batch's rows.
        max_tokens: as the argument; smaller after memory ran out.
    """

    def __init__(
        self,
        accelerated_step: AcceleratedStep,
        meta: StoreMeta,
        max_tokens: int,
        buckets: LengthBuckets,
        features: PackedVisionFeatures,
    ) -> None:
        base: Any = accelerated_step.base
        add_fused_lm_head(base)
        add_positions_argument(base)
        base.train()
        self.accelerated_step, self.base, self.meta = accelerated_step, base, meta
        self.max_tokens, self.buckets, self.features = max_tokens, buckets, features
        self.device, self.dtype = base.device, base.dtype
        self.adapters = AdapterBinding(accelerated_step)
        self.dropout = False  # becomes True for good with the first row that has dropout

    def add_gradients(self, rows: Sequence[PackedRow], add: Callable[[Any, Tensor], None]) -> PassResult:
        """Run rows forward and backward, in training mode.

        Args:
            add: called as `add(slot, gradient)` for each row. `gradient` is the row's gradient of its
                slot's flat adapter, `[P]`, in the dtype of the computation.
        """
        self._set_mode(training=True)
        if not self.dropout and any(row.dropout for row in rows):
            self.dropout = True
            self.accelerated_step.discard_decoder_graphs()
        return self._run_in_packed_batches(rows, partial(self._forward_backward, add=add))

    def losses(self, rows: Sequence[PackedRow]) -> PassResult:
        """Run rows forward without dropout, in evaluation mode."""
        self._set_mode(training=False)
        with torch.no_grad():
            return self._run_in_packed_batches(rows, partial(self._forward, dropout=False))

    @contextmanager
    def single_adapter(self, adapter: Tensor, scaling: float) -> Iterator[Any]:
        """The base with one adapter, `[P]`, for all rows, in evaluation mode; for generating answers."""
        self.adapters.bind_one(adapter, scaling)
        self._set_mode(training=False)
        yield self.base

    def _run_in_packed_batches(
        self, rows: Sequence[PackedRow], run: Callable[[Sequence[PackedRow]], RowLosses]
    ) -> PassResult:
        """Call `run` for each packed batch.

        If memory runs out, free some or halve the batch, and try again.
        """
        result = PassResult()
        remaining = list(packed_batches(rows, self.max_tokens, self.buckets))
        while remaining:
            part = [row for row in remaining.pop(0) if row.slot not in result.too_large]
            if not part:
                continue
            try:
                losses = run(part)
            except torch.OutOfMemoryError as error:
                shortage = memory_shortage(error)
                self.adapters.drop_gradients()
            else:
                for index, row in enumerate(part):
                    result.rows[id(row)] = losses.loss[index].detach(), losses.correct[index]
                # `losses` would keep memory of a captured step alive, which the next batch may have to free.
                del losses
                continue
            freed = self.features.disable() or self.accelerated_step.remove_capturing()
            torch.cuda.empty_cache()
            if freed:
                remaining.insert(0, part)
            elif len(part) == 1:
                result.too_large.append(part[0].slot)
                result.shortages.append(shortage)
            else:
                remaining = [*self._halves(part), *remaining]
        return result

    def _halves(self, part: list[PackedRow]) -> list[list[PackedRow]]:
        """The halves of a packed batch that did not fit. Later batches have no more tokens than a half."""
        half = -(-len(part) // 2)
        self.max_tokens = half * self._length(part)
        self.accelerated_step.note(
            f"out of GPU memory with {len(part)} rows at a time: continuing with {half}, "
            "every trial's step stays the same"
        )
        return [part[:half], part[half:]]

    def _forward_backward(self, part: Sequence[PackedRow], add: Callable[[Any, Tensor], None]) -> RowLosses:
        losses = self._forward(part, dropout=self.dropout)
        weights = to_device(torch.tensor([row.weight for row in part], dtype=torch.float32), self.device)
        # No gradient where all adapters are in cross-attention and no row has an image.
        if losses.loss.requires_grad:
            (losses.loss[: len(part)] * weights).sum().backward()
        gradients = self.adapters.gradients()
        self.adapters.drop_gradients()
        # One row after another, so that the sum is the same to the last bit however a slot's rows are
        # divided into packed batches. `add` allocates nothing: if it ran out of memory halfway, the batch
        # would run again and add its first rows twice.
        for row, gradient in zip(part, gradients, strict=False):
            add(row.slot, gradient)
        return losses

    def _forward(self, part: Sequence[PackedRow], *, dropout: bool) -> RowLosses:
        self.adapters.bind(part, dropout=dropout)
        dft = [row.dft for row in part] + [False] * (bucket_rows(len(part)) - len(part))
        length = self._length(part)
        features = self.features.inputs(pad_to_bucket(part), length) if part[0].has_image else None
        batch = make_batch(part, length, self.meta, self.device, self.dtype, pixels=features is None)
        return row_losses(
            self.base,
            {**batch, **(features or {})},
            to_device(torch.tensor(dft), self.device) if any(dft) else None,
        )

    def _length(self, part: Sequence[PackedRow]) -> int:
        """The length in tokens that the rows of a packed batch are padded to."""
        return self.buckets(max(row.tokens for row in part))

    def _set_mode(self, *, training: bool) -> None:
        if self.base.training != training:  # `train` traverses thousands of modules
            self.base.train(training)
