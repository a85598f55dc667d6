"""LoRA for many trials over one frozen linear layer: each row of a batch uses its own trial's adapter.

A trial's adapter is one flat float32 vector (`AdapterLayout`). Before a packed batch runs, the adapters of
its rows are copied into `RowAdapters`, in the dtype that the base computes in. An adapter of a lower rank
than the layout's is padded with zeros, which stay zero because their gradient is zero. The frozen layer
computes all rows as one batch. The adapters are two batched matrix products, in which no row's result depends
on another row.

Shapes: P size of an adapter's flat vector, B rows of a packed batch, T tokens, D in_features, O out_features,
R rank of the layout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # A [R, D] and B [O, R] of one layer


@dataclass(frozen=True)
class TargetLayer:
    """A frozen linear layer that gets adapters.

    Attributes:
        image_only: whether only rows with an image pass through it, as in Mllama's cross-attention.
    """

    name: str
    in_features: int
    out_features: int
    image_only: bool = False


class AdapterLayout:
    """Where A `[R, D]` and B `[O, R]` of each layer are in an adapter's flat vector.

    Attributes:
        lora_rank: the rank R.
        size: the length of the vector, P.
        image_start: index where the `image_only` layers begin, which are last; `size` if there are none.
    """

    def __init__(self, targets: Iterable[TargetLayer], lora_rank: int) -> None:
        self.lora_rank = lora_rank
        self.targets = sorted(targets, key=lambda target: target.image_only)
        self.sizes = [
            lora_rank * size for target in self.targets for size in (target.in_features, target.out_features)
        ]
        self.size = sum(self.sizes)
        self.image_start = lora_rank * sum(
            target.in_features + target.out_features for target in self.targets if not target.image_only
        )

    def views(self, flat: Tensor) -> list[Pair]:
        """A `[..., R, D]` and B `[..., O, R]` of each layer, as views of `flat` `[..., P]`."""
        parts = iter(flat.split(self.sizes, -1))
        return [
            (
                next(parts).unflatten(-1, (self.lora_rank, target.in_features)),
                next(parts).unflatten(-1, (target.out_features, self.lora_rank)),
            )
            for target in self.targets
        ]

    def pack(self, adapter: dict[str, Pair], device: torch.device | None = None) -> Tensor:
        """The flat float32 vector `[P]` of an adapter. Layers without an adapter are zero.

        Args:
            adapter: A `[r, D]` and B `[O, r]` by layer name, of any rank r up to the layout's.
        """
        flat = torch.zeros(self.size)
        for target, (a, b) in zip(self.targets, self.views(flat), strict=True):
            if target.name in adapter:
                adapter_a, adapter_b = adapter[target.name]
                a[: len(adapter_a)].copy_(adapter_a)
                b[:, : adapter_b.shape[1]].copy_(adapter_b)
        return flat.to(device)

    def unpack(self, flat: Tensor, names: Iterable[str], lora_rank: int) -> dict[str, Pair]:
        """A `[lora_rank, D]` and B `[O, lora_rank]` of the layers called `names`, on the CPU."""
        wanted = set(names)
        return {
            target.name: (a[:lora_rank].contiguous(), b[:, :lora_rank].contiguous())
            for target, (a, b) in zip(self.targets, self.views(flat.detach().cpu()), strict=True)
            if target.name in wanted
        }


class RowAdapters:
    """The adapters of the rows of a packed batch, at fixed memory addresses, which CUDA graphs need.

    Attributes:
        flat: `[B, P]` in the dtype of the computation.
        pairs: A `[B, R, D]` and B `[B, O, R]` of each layer, as views of `flat`.
        trained_tensors: the tensors of `pairs`, one after another; their gradients are per row.
        scaling: `[B, 1, 1]`, LoRA's factor of each row.
        dropout_key, dropout_threshold, dropout_scale: `[B, 1, 1]`, see `hash_dropout`.
    """

    def __init__(self, layout: AdapterLayout, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.zeros(rows, layout.size, dtype=dtype, device=device)
        self.pairs = [
            (a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in layout.views(self.flat)
        ]
        self.trained_tensors = [tensor for pair in self.pairs for tensor in pair]
        self.scaling = torch.zeros(rows, 1, 1, dtype=dtype, device=device)
        self.dropout_key = torch.zeros(rows, 1, 1, dtype=torch.int32, device=device)
        self.dropout_threshold = torch.zeros_like(self.dropout_key)
        self.dropout_scale = torch.ones_like(self.scaling)

    def set_dropout(self, keys: Sequence[int], rates: Sequence[float]) -> None:
        """Set the dropout of each row: its 32-bit key, and the probability that a value becomes zero."""
        self._fill(self.dropout_key, [key - 2**32 if key >= 2**31 else key for key in keys])
        self._fill(self.dropout_threshold, [int(rate * 2**31) for rate in rates])
        self._fill(self.dropout_scale, [1 / (1 - rate) for rate in rates])

    def set_scaling(self, scalings: Sequence[float]) -> None:
        self._fill(self.scaling, scalings)

    def gradients(self) -> Tensor:
        """The gradient of each row's adapter, `[B, P]` in the dtype of the computation."""
        return torch.cat(
            [
                (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).flatten(1)
                for tensor in self.trained_tensors
            ],
            1,
        )

    @staticmethod
    def _fill(tensor: Tensor, values: Sequence[float]) -> None:
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype).view(-1, 1, 1), non_blocking=True)


class PackedLinear(nn.Module):
    """A frozen linear layer that adds, for each row of a packed batch, the LoRA of that row's adapter.

    Without bound adapters it computes what the frozen layer does.

    Args:
        layer_id: a 32-bit number that the layer's dropout depends on.
    """

    def __init__(self, base: nn.Linear, layer_id: int) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        # A tensor, because all layers share compiled code, which torch would specialize for an int.
        self.register_buffer(
            "layer_id", torch.tensor(layer_id, dtype=torch.int32, device=base.weight.device), persistent=False
        )
        self.layer_id: Tensor
        self.a: Tensor | None
        self.b: Tensor | None
        self.bind(None, None)

    def bind(self, rows: RowAdapters | None, pair: Pair | None, *, dropout: bool = False) -> None:
        """Use `pair`, which is this layer's part of the adapters `rows`, from now on.

        None removes the adapters.

        Args:
            dropout: whether any of the rows has dropout.
        """
        self.a, self.b = pair or (None, None)
        self.scaling = rows.scaling if rows is not None else None
        with_dropout = rows if dropout else None
        self.dropout_key = with_dropout.dropout_key if with_dropout is not None else None
        self.dropout_threshold = with_dropout.dropout_threshold if with_dropout is not None else None
        self.dropout_scale = with_dropout.dropout_scale if with_dropout is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[B, T, O]` from `x` `[B, T, D]`.

        `x` may also be `[B * n, T, D]`, where each row has n parts, such as the tiles of an image.
        """
        y: Tensor = self.base(x)
        if self.a is None or self.b is None or self.scaling is None:
            return y
        rows = x.to(y.dtype).reshape(len(self.a), -1, self.in_features)
        key, threshold, scale = self.dropout_key, self.dropout_threshold, self.dropout_scale
        if key is not None and threshold is not None and scale is not None:
            rows = hash_dropout(rows, key, self.layer_id, threshold, scale)
        low = torch.bmm(rows, self.a.transpose(1, 2)) * self.scaling
        return y + torch.bmm(low, self.b.transpose(1, 2)).view_as(y)


def hash_dropout(x: Tensor, key: Tensor, layer_id: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """Dropout of `x` `[B, N, D]`, each row with its own rate and its own key.

    A hash of the row's key, the layer and the value's index decides whether a value becomes zero. With
    torch's generator, a row's zeros would depend on the rows beside it.

    Args:
        key: int32 `[B, 1, 1]`.
        layer_id: int32 scalar.
        threshold: int32 `[B, 1, 1]`, rate * 2**31.
        scale: `[B, 1, 1]`, 1 / (1 - rate), the factor of the other values.
    """
    index = torch.arange(x.shape[1] * x.shape[2], dtype=torch.int32, device=x.device).view(
        1, x.shape[1], x.shape[2]
    )
    # `index` itself is not multiplied, because in compiled code the product would be part of an index and not
    # wrap.
    mixed = _hash(index ^ _hash(key ^ _hash(layer_id ^ 0x2545F491)))
    return torch.where((mixed & 0x7FFFFFFF) >= threshold, x * scale, 0.0)


def _hash(h: Tensor) -> Tensor:
    """lowbias32 (https://nullprogram.com/blog/2018/07/31/), a hash function, on int32."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def pack_layers(model: nn.Module, names: Sequence[str]) -> dict[str, PackedLinear]:
    """Wrap the linear layers `names` of the model in place, unless they are wrapped; returns them by name."""
    packed: dict[str, PackedLinear] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, PackedLinear):
            assert isinstance(layer, nn.Linear)
            # A hash of the name, so that a layer's dropout does not depend on which other layers have
            # adapters.
            layer = PackedLinear(layer, zlib.crc32(name.encode()) - 2**31)
            setattr(model.get_submodule(parent), child, layer)
        packed[name] = layer
    return packed
