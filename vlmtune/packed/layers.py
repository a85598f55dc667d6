"""LoRA for many trials over one frozen linear layer: every row of a batch goes through the adapter of its
own trial.

A trial's adapter is one flat float32 vector (`AdapterLayout`). Before a pass, the adapters of its rows are copied
into `RowAdapters`, in the type
that the base computes in; a slot of lower rank is filled up with zeros, which stay zero: their gradient is a
product with zero. The frozen
layer sees all rows as one batch, and the adapters are two batched products, one a row: no row's numbers
depend on another row's.

Shapes: P numbers of an adapter, B rows of a pass, T tokens, D in_features, O out_features, R rank of the
layout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Target:
    """A frozen linear layer that gets adapters. `pictured`: only rows with a picture reach it (Mllama's
    cross-attention)."""

    name: str
    in_features: int
    out_features: int
    pictured: bool = False


class AdapterLayout:
    """Where A `[R, D]` and B `[O, R]` of each layer lie in the flat vector of an adapter; layers that only
    pictures reach come last."""

    def __init__(self, targets: Iterable[Target], rank: int) -> None:
        self.rank = rank
        self.targets = sorted(targets, key=lambda target: target.pictured)
        self.sizes = [
            rank * size for target in self.targets for size in (target.in_features, target.out_features)
        ]
        self.size = sum(self.sizes)
        self.always = rank * sum(
            target.in_features + target.out_features for target in self.targets if not target.pictured
        )

    def views(self, flat: Tensor) -> list[Pair]:
        """A `[..., R, D]` and B `[..., O, R]` of each layer, as views of `flat` `[..., P]`."""
        parts = iter(flat.split(self.sizes, -1))
        return [
            (
                next(parts).unflatten(-1, (self.rank, target.in_features)),
                next(parts).unflatten(-1, (target.out_features, self.rank)),
            )
            for target in self.targets
        ]

    def pack(self, adapter: dict[str, Pair], device: torch.device | None = None) -> Tensor:
        """The flat float32 vector of an adapter of at most this rank, given as A `[r, D]` and B `[O, r]` by
        layer; others are zero."""
        flat = torch.zeros(self.size)
        for target, (a, b) in zip(self.targets, self.views(flat), strict=True):
            if target.name in adapter:
                given_a, given_b = adapter[target.name]
                a[: len(given_a)].copy_(given_a)
                b[:, : given_b.shape[1]].copy_(given_b)
        return flat.to(device)

    def unpack(self, flat: Tensor, names: Iterable[str], rank: int) -> dict[str, Pair]:
        """A `[rank, D]` and B `[O, rank]` of the layers called `names`, on the CPU."""
        wanted = set(names)
        return {
            target.name: (a[:rank].contiguous(), b[:, :rank].contiguous())
            for target, (a, b) in zip(self.targets, self.views(flat.detach().cpu()), strict=True)
            if target.name in wanted
        }


class RowAdapters:
    """The adapters of the rows of a pass: memory that stays in place for each number of rows, so that a
    recorded step finds it again.

    Attributes:
        flat: `[B, P]` in the type of the computation.
        leaves: A `[B, R, D]` and B `[B, O, R]` of each layer, in turn; their gradients are those of each row.
        scaling: `[B, 1, 1]`, LoRA's factor.
        key, threshold, boost: `[B, 1, 1]` of the dropout, see `dropped`.
    """

    def __init__(self, layout: AdapterLayout, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.zeros(rows, layout.size, dtype=dtype, device=device)
        self.pairs = [
            (a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in layout.views(self.flat)
        ]
        self.leaves = [leaf for pair in self.pairs for leaf in pair]
        self.scaling = torch.zeros(rows, 1, 1, dtype=dtype, device=device)
        self.key = torch.zeros(rows, 1, 1, dtype=torch.int32, device=device)
        self.threshold = torch.zeros_like(self.key)
        self.boost = torch.ones_like(self.scaling)

    def set_dropout(self, keys: Sequence[int], rates: Sequence[float]) -> None:
        """The dropout of each row: `keys` of 32 bits that its zeros follow from, `rates` the share of
        them."""
        self._fill(self.key, [key - 2**32 if key >= 2**31 else key for key in keys])
        self._fill(self.threshold, [int(rate * 2**31) for rate in rates])
        self._fill(self.boost, [1 / (1 - rate) for rate in rates])

    def set_scaling(self, scalings: Sequence[float]) -> None:
        self._fill(self.scaling, scalings)

    def gradients(self) -> Tensor:
        """Of each row, `[B, P]` in the type of the computation."""
        return torch.cat(
            [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten(1) for leaf in self.leaves],
            1,
        )

    @staticmethod
    def _fill(tensor: Tensor, values: Sequence[float]) -> None:
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype).view(-1, 1, 1), non_blocking=True)


class PackedLinear(nn.Module):
    """A frozen linear layer with an adapter for each row of the pass that is bound to it; without one, the
    layer alone."""

    def __init__(self, base: nn.Linear, number: int) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        # A tensor and not a number: compiled code is shared by the layers.
        self.register_buffer(
            "number", torch.tensor(number, dtype=torch.int32, device=base.weight.device), persistent=False
        )
        self.number: Tensor
        self.a: Tensor | None
        self.b: Tensor | None
        self.bind(None, None)

    def bind(self, rows: RowAdapters | None, pair: Pair | None, *, dropout: bool = False) -> None:
        """Use the adapters `pair` of `rows` from now on; `dropout`: whether any of them has one."""
        self.a, self.b = pair or (None, None)
        self.scaling = rows.scaling if rows is not None else None
        with_dropout = rows if dropout else None
        self.key = with_dropout.key if with_dropout is not None else None
        self.threshold = with_dropout.threshold if with_dropout is not None else None
        self.boost = with_dropout.boost if with_dropout is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, D] to [B, T, O]; also [B * n, T, D] of rows that hold n parts each, such as the tiles
        of a picture."""
        y: Tensor = self.base(x)
        if self.a is None or self.b is None or self.scaling is None:
            return y
        rows = x.to(y.dtype).reshape(len(self.a), -1, self.in_features)
        if self.key is not None and self.threshold is not None and self.boost is not None:
            rows = dropped(rows, self.key, self.number, self.threshold, self.boost)
        low = torch.bmm(rows, self.a.transpose(1, 2)) * self.scaling
        return y + torch.bmm(low, self.b.transpose(1, 2)).view_as(y)


def dropped(x: Tensor, key: Tensor, number: Tensor, threshold: Tensor, boost: Tensor) -> Tensor:
    """`x` [B, N, D] with a share of its numbers set to zero and the others enlarged, each row by its own
    rate and its own key.

    Whether a number is kept follows from the row's key, the layer and the place alone: torch's generator
    would give a row other zeros with
    other neighbours. Args: `key`, `threshold` int32 [B, 1, 1], the latter rate * 2**31; `boost` 1 / (1 -
    rate); `number` of the layer.
    """
    place = torch.arange(x.shape[1] * x.shape[2], dtype=torch.int32, device=x.device).view(
        1, x.shape[1], x.shape[2]
    )
    # No product with `place` itself: compiled, it would become part of an index, and not wrap.
    mixed = _mixed(place ^ _mixed(key ^ _mixed(number ^ 0x2545F491)))
    return torch.where((mixed & 0x7FFFFFFF) >= threshold, x * boost, 0.0)


def _mixed(h: Tensor) -> Tensor:
    """A hash of 32 bits in int32, whose products wrap: lowbias32,
    https://nullprogram.com/blog/2018/07/31/."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def pack_layers(model: nn.Module, names: Sequence[str]) -> dict[str, PackedLinear]:
    """Wrap the linear layers called `names`, in place; those that are wrapped already stay. Returns all of
    them by name."""
    packed: dict[str, PackedLinear] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, PackedLinear):
            assert isinstance(layer, nn.Linear)
            number = (
                zlib.crc32(name.encode()) - 2**31
            )  # by the name: dropout depends on no other layer that has an adapter
            layer = PackedLinear(layer, number)
            setattr(model.get_submodule(parent), leaf, layer)
        packed[name] = layer
    return packed
