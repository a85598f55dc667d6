"""`AdapterBinding`: makes the wrapped layers of a base use the adapters of a packed batch's rows.

An adapter is one flat vector `[P]`: A and B of all its layers, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vlmtune.model.step import AcceleratedStep
from vlmtune.packed.layers import AdapterLayout, PackedLinear, RowAdapters, TargetLayer, pack_layers
from vlmtune.packed.packed_batch import PackedRow, pad_to_bucket


class AdapterBinding:
    """The wrapped layers of a base, and the memory from which they read the rows' adapters.

    Args:
        accelerated_step: the base, whose captured graphs are discarded when adapters move in memory.

    Attributes:
        layout: where A and B of each layer are in the flat vector of an adapter.
        layers: the wrapped layers by their names.
    """

    def __init__(self, accelerated_step: AcceleratedStep) -> None:
        self.accelerated_step = accelerated_step
        self.device, self.dtype = accelerated_step.base.device, accelerated_step.base.dtype
        self.layout = AdapterLayout([], 1)
        self.layers: dict[str, PackedLinear] = {}
        self._buffers: dict[int, RowAdapters] = {}  # by number of rows
        self._bound: tuple[int, bool] | None = None  # number of rows, and whether with dropout

    def make_room(self, targets: Sequence[TargetLayer], lora_rank: int) -> bool:
        """Make the layout large enough for adapters of `targets` and `lora_rank`; returns whether it changed.

        After a change, the caller has to pack flat vectors of the old layout again.
        """
        known = {target.name for target in self.layout.targets}
        if lora_rank <= self.layout.lora_rank and known >= {target.name for target in targets}:
            return False
        every = [*self.layout.targets, *(target for target in targets if target.name not in known)]
        self.set_layout(AdapterLayout(every, max(lora_rank, self.layout.lora_rank)))
        return True

    def start_at_rank(self, lora_rank: int) -> None:
        """Give the layout, while it has no adapter, the highest rank that any trial will have.

        The rank of the layout changes the rounding of products, and at high learning rates such differences
        grow. So it must not depend on the other trials, which are different ones when a trial resumes.
        """
        assert not self.layout.targets
        self.set_layout(AdapterLayout([], max(lora_rank, self.layout.lora_rank)))

    def set_layout(self, layout: AdapterLayout) -> None:
        """Use another layout. CUDA graphs use the old layout's memory, so they are discarded."""
        self.layout = layout
        self.layers = pack_layers(self.accelerated_step.base, [target.name for target in layout.targets])
        self._buffers, self._bound = {}, None
        self.accelerated_step.discard_decoder_graphs()

    def clear(self) -> None:
        """Remove the adapters from all layers, and make the layout empty."""
        for layer in self.layers.values():
            layer.bind(None, None)
        self.set_layout(AdapterLayout([], 1))

    def bind(self, rows: Sequence[PackedRow], *, dropout: bool) -> None:
        """Copy the rows' adapters into a buffer, and make the layers use it.

        Padding rows get the adapter of the last row.
        """
        padded = pad_to_bucket(rows)
        size = len(padded)
        if size not in self._buffers:
            self._buffers[size] = RowAdapters(self.layout, size, self.dtype, self.device)
        buffer = self._buffers[size]
        first = 0
        for _, group in groupby(padded, key=lambda row: row.adapter.data_ptr()):
            same = list(group)
            with torch.no_grad():
                buffer.flat[first : first + len(same)].copy_(same[0].adapter)
            first += len(same)
        buffer.set_scaling([row.scaling for row in padded])
        if dropout:
            buffer.set_dropout([row.dropout_key for row in padded], [row.dropout for row in padded])
        if self._bound != (size, dropout):
            self._use_buffer(buffer, dropout=dropout)
            self._bound = size, dropout

    def bind_one(self, adapter: Tensor, scaling: float) -> None:
        """Use one adapter, `[P]`, for every row, without dropout."""
        one = RowAdapters(self.layout, 1, self.dtype, self.device)
        with torch.no_grad():
            one.flat[0].copy_(adapter)
        one.set_scaling([scaling])
        self._use_buffer(one, dropout=False)
        self._bound = None

    def trained_tensors(self) -> list[Tensor]:
        """A and B of each layer for the present packed batch: the tensors that get its gradients."""
        return self._buffers[self._bound[0]].trained_tensors if self._bound is not None else []

    def gradients(self) -> Tensor:
        """The gradient of each row's adapter in the present packed batch, `[B, P]`."""
        assert self._bound is not None
        return self._buffers[self._bound[0]].gradients()

    def drop_gradients(self) -> None:
        for tensor in self.trained_tensors():
            tensor.grad = None

    def _use_buffer(self, rows: RowAdapters, *, dropout: bool) -> None:
        for target, pair in zip(self.layout.targets, rows.pairs, strict=True):
            self.layers[target.name].bind(rows, pair, dropout=dropout)
