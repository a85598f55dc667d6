"""The losses and gradients of two rows in a packed step, for the self-check."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtune.evaluation.check_step import CheckedRows
from vlmtune.model.capture import WARM_UP_CALLS
from vlmtune.model.mllama import image_only_modules
from vlmtune.model.self_check import StepResult, without_dropout
from vlmtune.packed.layers import TargetLayer
from vlmtune.packed.packed_batch import PackedRow
from vlmtune.packed.packed_model import PackedModel


def target_layers(base: Any, names: Sequence[str]) -> list[TargetLayer]:
    """The frozen layers with these full names that get adapters."""
    image_only = image_only_modules(base)
    layers = [(name, base.get_submodule(name)) for name in names]
    return [
        TargetLayer(name, layer.in_features, layer.out_features, image_only=name in image_only)
        for name, layer in layers
    ]


def packed_result(
    model: PackedModel,
    targets: Sequence[TargetLayer],
    initial_a: dict[str, Tensor],
    rows: CheckedRows,
    places: Sequence[int],
) -> StepResult:
    """Losses and gradients of rows in one packed batch. Afterwards, the model has no adapters.

    Args:
        initial_a: A `[R, D]` of each target; B is zero.
        rows: the rows of the self-check.
        places: indices, among `rows`, of the rows to compute.
    """
    rank = len(next(iter(initial_a.values())))
    model.adapters.make_room(targets, rank)
    layout = model.adapters.layout
    sizes = {target.name: target.out_features for target in targets}
    adapter = layout.pack(
        {name: (a.cpu(), torch.zeros(sizes[name], rank)) for name, a in initial_a.items()}, model.device
    )
    packed_rows = [
        PackedRow("self-check", rows.numbers[place], rows.examples[place], adapter, 1.0) for place in places
    ]
    gradient = torch.zeros_like(adapter)

    def add(slot: Any, part: Tensor) -> None:
        gradient.add_(part)

    with without_dropout(model.base):
        for _ in range(WARM_UP_CALLS + 2 if model.accelerated_step.captures_graphs else 1):
            gradient.zero_()
            result = model.add_gradients(packed_rows, add)
    if result.too_large:
        raise torch.OutOfMemoryError
    losses = torch.stack([result.rows[id(row)][0] for row in packed_rows])
    pairs = layout.unpack(gradient, sizes, rank)
    model.adapters.clear()
    return StepResult(losses, {name: b.to(model.device) for name, (_, b) in pairs.items()})
