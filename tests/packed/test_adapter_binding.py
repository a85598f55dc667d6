"""The wrapped layers of a base read the adapters of the rows of the pass under way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import row_of

from vlmtune.model.base import load_base
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.model_ref import ModelRef
from vlmtune.packed.adapter_binding import AdapterBinding
from vlmtune.packed.layers import TargetLayer
from vlmtune.packed.packed_batch import PackedRow


@pytest.fixture
def binding(models: Path) -> AdapterBinding:
    base: Any = load_base(
        ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    plan = StepPlan(dequantized=False, checkpointing=False, micro_batch_size=3, compiled=False)
    return AdapterBinding(AcceleratedStep(base, plan, print))


def targets(binding: AdapterBinding, *names: str) -> list[TargetLayer]:
    found = []
    for name, module in binding.accelerated_step.base.named_modules():
        if name.endswith(tuple(f"layers.0.self_attn.{tensor}" for tensor in names)) and "language" in name:
            found.append(TargetLayer(name, module.in_features, module.out_features))
    return found


def rows_with(adapter: torch.Tensor, count: int) -> list[PackedRow]:
    return [row_of("slot", 8, adapter=adapter) for _ in range(count)]


def test_the_layout_grows_and_never_shrinks(binding: AdapterBinding) -> None:
    q, k = targets(binding, "q_proj"), targets(binding, "k_proj")
    assert binding.make_room(q, 4)
    assert not binding.make_room(q, 2)
    assert binding.make_room(k, 2)
    assert (len(binding.layout.targets), binding.layout.lora_rank) == (2, 4)
    assert binding.make_room(q, 8)
    assert not binding.make_room([*q, *k], 8)


def test_the_layout_begins_at_the_highest_rank_that_will_come(binding: AdapterBinding) -> None:
    binding.start_at_rank(8)
    assert binding.make_room(targets(binding, "q_proj"), 2), "a layer is new"
    assert binding.layout.lora_rank == 8
    assert not binding.make_room(targets(binding, "q_proj"), 8)


def test_rows_read_their_own_adapters_and_padding_the_last_ones(binding: AdapterBinding) -> None:
    binding.make_room(targets(binding, "q_proj"), 2)
    one, other = torch.randn(binding.layout.size), torch.randn(binding.layout.size)
    binding.bind([*rows_with(one, 2), *rows_with(other, 3)], dropout=False)
    a, b = binding.trained_tensors()
    assert len(a) == len(b) == 6, "padded to a bucket"
    for row, flat in enumerate([one, one, other, other, other, other]):
        ((expected_a, expected_b),) = binding.layout.views(flat)
        assert torch.equal(a[row], expected_a)
        assert torch.equal(b[row], expected_b)


def test_a_number_of_rows_keeps_its_memory(binding: AdapterBinding) -> None:
    """CUDA graphs read the same addresses in every pass."""
    binding.make_room(targets(binding, "q_proj"), 2)
    flat = torch.randn(binding.layout.size)
    addresses = []
    for count in (2, 3, 2):
        binding.bind(rows_with(flat, count), dropout=False)
        addresses.append(binding.trained_tensors()[0].data_ptr())
    assert addresses[0] == addresses[2] != addresses[1]
    binding.bind_one(flat, 1.0)
    assert binding.trained_tensors() == []
    binding.bind(rows_with(flat, 2), dropout=False)
    assert binding.trained_tensors()[0].data_ptr() == addresses[0]
