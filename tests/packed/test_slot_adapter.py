"""A trial's adapter moves from one layout to another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import make_engine
from training_kit import values_of
from transformers import TrainerState

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.packed.layers import AdapterLayout, TargetLayer
from vlmtune.packed.slot_adapter import SlotAdapter
from vlmtune.packed.trial_checkpoint import TrialCheckpoint
from vlmtune.training.trl_arguments import training_arguments

pytestmark = pytest.mark.timeout(200)


def test_without_memory_for_a_larger_layout_the_other_adapters_stay_as_they_were(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, model = stores["mall llava"], models / "llava"
    values = values_of(store, model, max_steps=4, eval_steps=4, lora_target_modules=["q_proj"])
    alone = make_engine(values, store, tmp_path / "alone")
    alone.join("one", values)
    alone.join("two", values)
    alone.run()
    alone.close()
    packed = make_engine(values, store, tmp_path / "disturbed")
    packed.join("one", values)
    packed.join("two", values)
    packed.engine.train_round()
    lay_out, layout = SlotAdapter.lay_out, packed.engine.model.adapters.layout

    def full_for_two(self: SlotAdapter, new: AdapterLayout, device: torch.device) -> None:
        if self is packed.engine.slots["two"].adapter and new is not layout:
            raise torch.OutOfMemoryError("injected")
        lay_out(self, new, device)

    monkeypatch.setattr(SlotAdapter, "lay_out", full_for_two)
    packed.join("large", {**values, "lora_target_modules": "all-linear"})
    packed.run()
    packed.close()
    assert packed.reports["large"][-1].metrics["infeasible"]
    for name in ("one", "two"):
        assert packed.reports[name][-1].metrics["eval_loss"] == alone.reports[name][-1].metrics["eval_loss"]


TARGETS = [TargetLayer("q", 12, 8), TargetLayer("cross", 8, 12, image_only=True)]
OTHERS = [TargetLayer("k", 12, 8), *TARGETS, TargetLayer("v", 12, 4)]
CPU = torch.device("cpu")


def make_adapter(tmp_path: Path, checkpoint: TrialCheckpoint | None = None, **options: Any) -> SlotAdapter:
    settings = Settings.from_flags(
        {"use_cpu": True, "lora_r": 2, "lora_alpha": 4, "learning_rate": 1e-2, **options}
    )
    args = training_arguments(settings, str(tmp_path), checkpointing=False)
    return SlotAdapter(TARGETS, settings, args, 8, checkpoint)


def step(adapter: SlotAdapter, number: int) -> None:
    """Make an optimizer step with a gradient that does not depend on the layout."""
    generator = torch.Generator().manual_seed(number)
    gradient = {
        target.name: (
            torch.randn(2, target.in_features, generator=generator),
            torch.randn(target.out_features, 2, generator=generator),
        )
        for target in TARGETS
    }
    adapter.add_gradient(adapter.layout.pack(gradient))
    adapter.optimizer.step(has_images=True)


def numbers(adapter: SlotAdapter) -> torch.Tensor:
    return adapter.own_layout.pack(adapter.layout.unpack(adapter.flat, adapter.names, adapter.lora_rank))


def test_an_adapter_trains_the_same_in_every_layout(tmp_path: Path) -> None:
    small, moving = make_adapter(tmp_path), make_adapter(tmp_path)
    for adapter in (small, moving):
        adapter.lay_out(adapter.own_layout, CPU)
    large = AdapterLayout(OTHERS, 4)
    for number, layout in enumerate([moving.own_layout, large, large, AdapterLayout(TARGETS, 3)]):
        moving.lay_out(layout, CPU)
        step(small, number)
        step(moving, number)
        torch.testing.assert_close(numbers(moving), numbers(small))
    assert int(moving.flat.count_nonzero()) == moving.own_layout.size, "padding stays zero"


def test_a_gradient_that_was_not_used_yet_moves_too(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    adapter.lay_out(adapter.own_layout, CPU)
    adapter.add_gradient(torch.ones(adapter.own_layout.size))
    adapter.lay_out(AdapterLayout(OTHERS, 4), CPU)
    assert adapter.optimizer.gradient.sum() == adapter.own_layout.size


def test_a_copy_resumes_in_another_layout(tmp_path: Path) -> None:
    whole = make_adapter(tmp_path)
    whole.lay_out(AdapterLayout(OTHERS, 4), CPU)
    step(whole, 0)
    copied = whole.begin_copy()
    before = numbers(whole).clone()
    step(whole, 1)
    adapter, optimizer = copied.wait()
    resumed = make_adapter(tmp_path, TrialCheckpoint(adapter, optimizer, TrainerState()))
    resumed.lay_out(AdapterLayout(TARGETS, 3), CPU)
    assert torch.equal(numbers(resumed), before), "training went on while it was copied"
    step(resumed, 1)
    torch.testing.assert_close(numbers(resumed), numbers(whole))


def test_scaling_is_that_of_peft(tmp_path: Path) -> None:
    assert make_adapter(tmp_path, lora_r=4, lora_alpha=8).scaling == 2.0
    assert make_adapter(tmp_path, lora_r=4, lora_alpha=8, use_rslora=True).scaling == 4.0
