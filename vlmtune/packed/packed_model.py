"""The frozen base with an adapter for each row: passes forward and back, for rows of any trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlmtune.compat.trl import add_fused_lm_head
from vlmtune.data.store import StoreMeta
from vlmtune.model.head import score_positions
from vlmtune.model.step import AcceleratedStep
from vlmtune.model.transfer import to_device
from vlmtune.packed.layers import AdapterLayout, RowAdapters, Target, pack_layers
from vlmtune.packed.loss import RowLosses, row_losses
from vlmtune.packed.passes import PassRow, batch_of, bucket_length, bucket_rows, cut_passes, filled_up
from vlmtune.packed.vision_features import VisionFeatures


@dataclass(frozen=True)
class PassResult:
    """Of rows that went through: by `id(row)` the summed loss and the tokens that were predicted right; and
    the owners of rows that do not
    fit in memory, not even alone."""

    rows: dict[int, tuple[Tensor, Tensor]]
    too_large: list[Any]


class PackedModel:
    """A base whose target layers take the adapters of the rows that pass.

    Attributes:
        tokens: at most so many go through at once; fewer after the memory ran out.
        layout: where an adapter's layers lie in its flat vector. Another one after `fit`, see there.
    """

    def __init__(self, step: AcceleratedStep, meta: StoreMeta, tokens: int, features: VisionFeatures) -> None:
        base: Any = step.base
        add_fused_lm_head(base)
        score_positions(base)
        base.train()
        self.step, self.base, self.meta, self.tokens, self.features = step, base, meta, tokens, features
        self.device, self.dtype = base.device, base.dtype
        self.layout = AdapterLayout([], 1)
        self.layers: dict[str, Any] = {}
        self.buffers: dict[int, RowAdapters] = {}
        self.bound: tuple[int, bool] | None = None
        self.dropout = False  # whether any trial has had one: the layers then always look

    def leaves(self) -> list[Tensor]:
        """The adapters of the rows of the pass under way, in turn A and B of each layer: what its gradients
        are for."""
        return self.buffers[self.bound[0]].leaves if self.bound is not None else []

    def fit(self, targets: Sequence[Target], rank: int) -> bool:
        """Make room for adapters of `targets` and `rank`; returns whether the layout is another one now.

        Flat vectors of the old layout must then be packed anew, and recorded steps are forgotten.
        """
        known = {target.name for target in self.layout.targets}
        if rank <= self.layout.rank and known >= {target.name for target in targets}:
            return False
        every = [*self.layout.targets, *(target for target in targets if target.name not in known)]
        self.use(AdapterLayout(every, max(rank, self.layout.rank)))
        return True

    def use(self, layout: AdapterLayout) -> None:
        """Take the adapters' numbers from places of this layout from now on."""
        self.layout = layout
        self.layers = pack_layers(self.base, [target.name for target in layout.targets])
        self.buffers, self.bound = {}, None
        self.step.forget_graphs()

    def add_gradients(self, rows: Sequence[PassRow], add: Callable[[Any, Tensor], None]) -> PassResult:
        """Run rows forward and back. `add(owner, gradient)` gets the summed gradient `[P]` of each owner's
        rows in a pass."""

        def run(part: Sequence[PassRow]) -> RowLosses:
            losses = self._forward(part, dropout=self.dropout)
            weights = to_device(torch.tensor([row.weight for row in part], dtype=torch.float32), self.device)
            if (
                losses.loss.requires_grad
            ):  # else the adapters are on cross-attention alone, and no row has a picture
                (losses.loss[: len(part)] * weights).sum().backward()
            gradients = self.buffers[bucket_rows(len(part))].gradients()
            self._drop_gradients()
            groups = {owner: len(list(group)) for owner, group in groupby(part, key=lambda row: row.owner)}
            mine = gradients[: len(part)].split(list(groups.values()))
            summed = [
                gradient.sum(0, dtype=torch.float32) for gradient in mine
            ]  # all before the first is added: a pass may run again
            for owner, gradient in zip(groups, summed, strict=True):
                add(owner, gradient)
            return losses

        self._set_mode(training=True)
        if not self.dropout and any(row.rate for row in rows):
            self.dropout = True
            self.step.forget_graphs()
        return self._in_passes(rows, run)

    def losses(self, rows: Sequence[PassRow]) -> PassResult:
        """The same without gradients and dropout, in evaluation mode."""
        self._set_mode(training=False)
        with torch.no_grad():
            return self._in_passes(rows, partial(self._forward, dropout=False))

    @contextmanager
    def selected(self, adapter: Tensor, scaling: float) -> Iterator[Any]:
        """The base with one adapter for whatever goes through it in the block, in evaluation mode: to
        generate with."""
        one = RowAdapters(self.layout, 1, self.dtype, self.device)
        with torch.no_grad():
            one.flat[0].copy_(adapter)
        one.set_scaling([scaling])
        for target, pair in zip(self.layout.targets, one.pairs, strict=True):
            self.layers[target.name].bind(one, pair)
        self.bound = None
        self._set_mode(training=False)
        yield self.base

    def _in_passes(
        self, rows: Sequence[PassRow], run: Callable[[Sequence[PassRow]], RowLosses]
    ) -> PassResult:
        """`run` each pass; one that does not fit in memory again in halves. An owner with a row that does
        not fit alone is left out."""
        found = PassResult({}, [])
        waiting = list(cut_passes(rows, self.tokens))
        while waiting:
            part = [row for row in waiting.pop(0) if row.owner not in found.too_large]
            if not part:
                continue
            try:
                losses = run(part)
                found.rows.update(
                    {
                        id(row): (losses.loss[place].detach(), losses.right[place])
                        for place, row in enumerate(part)
                    }
                )
                del losses  # else it would hold on to recorded steps that are to give way
                continue
            except torch.OutOfMemoryError:
                self._drop_gradients()
            more = self.features.drop() or self.step.drop_graphs()
            torch.cuda.empty_cache()
            if more:
                waiting.insert(0, part)
                continue
            if len(part) == 1:
                found.too_large.append(part[0].owner)
                continue
            half = -(-len(part) // 2)
            self.tokens = half * bucket_length(max(len(row.example.input_ids) for row in part))
            self.step.note(
                f"out of GPU memory with {len(part)} rows at a time: going on with {half}, every trial's step stays the same"
            )
            waiting = [part[:half], part[half:], *waiting]
        return found

    def _set_mode(self, *, training: bool) -> None:
        if self.base.training != training:  # a walk through thousands of modules
            self.base.train(training)

    def _drop_gradients(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    def _forward(self, part: Sequence[PassRow], *, dropout: bool) -> RowLosses:
        self._bind(part, dropout=dropout)
        dft = [row.dft for row in part] + [False] * (bucket_rows(len(part)) - len(part))
        features = self.features.of(filled_up(part)) if part[0].pictured else None
        batch = batch_of(part, self.meta, self.device, self.dtype, pixels=features is None)
        return row_losses(
            self.base,
            {**batch, **(features or {})},
            to_device(torch.tensor(dft), self.device) if any(dft) else None,
        )

    def _bind(self, part: Sequence[PassRow], *, dropout: bool) -> None:
        """Lay the rows' adapters out, and point the layers at them. Rows that fill up have the last one's,
        and no gradient."""
        size = bucket_rows(len(part))
        if size not in self.buffers:
            self.buffers[size] = RowAdapters(self.layout, size, self.dtype, self.device)
        buffer = self.buffers[size]
        filled = filled_up(part)
        first = 0
        for _, group in groupby(filled, key=lambda row: row.adapter.data_ptr()):
            same = list(group)
            with torch.no_grad():
                buffer.flat[first : first + len(same)].copy_(same[0].adapter)
            first += len(same)
        buffer.set_scaling([row.scaling for row in filled])
        if dropout:
            buffer.set_dropout([row.key for row in filled], [row.rate for row in filled])
        if self.bound != (size, dropout):
            for target, pair in zip(self.layout.targets, buffer.pairs, strict=True):
                self.layers[target.name].bind(buffer, pair, dropout=dropout)
            self.bound = size, dropout
