"""Passes over the base that do not fit in the memory."""

import gc
import re
from pathlib import Path

import pytest
import torch
from packed_kit import CLOSE, Packed, pack
from training_kit import difference

from vlmtune.data.store import Store
from vlmtune.packed.layers import RowAdapters

pytestmark = pytest.mark.timeout(200)


def test_a_pass_that_does_not_fit_runs_in_halves_with_the_same_result(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, trials = (
        stores["mall llava"],
        {"a": {"lora_r": 4, "max_steps": 3}, "b": {"lora_r": 8, "max_steps": 3}},
    )
    whole = pack(store, models / "llava", tmp_path / "whole", trials)
    whole.run()
    whole.close()
    gradients, sizes = RowAdapters.gradients, []

    def full_above_three(self: RowAdapters) -> torch.Tensor:
        sizes.append(len(self.flat))
        if len(self.flat) > 3:
            raise torch.OutOfMemoryError("injected after the backward pass")
        return gradients(self)

    monkeypatch.setattr(RowAdapters, "gradients", full_above_three)
    halved = pack(store, models / "llava", tmp_path / "halved", trials)
    halved.run()
    halved.close()
    assert max(sizes) == 8
    assert max(sizes[-4:]) <= 3, "later passes have no more rows than fit"
    assert any("out of GPU memory with 8 rows" in note for note in halved.notes)
    for name in trials:
        assert difference(halved.adapter(name), whole.adapter(name)) < CLOSE
        assert halved.losses(name) == pytest.approx(whole.losses(name), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory is that of a GPU")
def test_a_gpu_that_is_too_small_for_a_pass(stores: dict[str, Store], models: Path, tmp_path: Path):
    shared = {
        "use_cpu": False,
        "dtype": "float32",
        "cuda_graphs": False,
        "torch_compile": False,
        "per_device_train_batch_size": 32,
    }
    trials = {name: {"lora_r": 8, "max_steps": 3, "learning_rate": 1e-3} for name in ("a", "b")}

    def idle() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def run(name: str) -> Packed:
        torch.cuda.reset_peak_memory_stats()
        packed = pack(stores["mall llava"], models / "llava", tmp_path / name, trials, **shared)
        packed.run()
        packed.close()
        return packed

    run("first")  # leaves what the libraries keep for themselves: more than this model takes
    reserved = idle()
    roomy = run("roomy")
    used = torch.cuda.max_memory_reserved() - reserved
    assert not any("out of GPU memory" in note for note in roomy.notes)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):  # memory is used in blocks, so not every cap is one
        limit = idle() + share * used
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            capped = run(f"capped {share}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if capped.notes != roomy.notes:
            break
    assert any(
        re.search(r"out of GPU memory with \d+ rows at a time: continuing with", note)
        for note in capped.notes
    ), capped.notes
    for name in trials:
        assert capped.losses(name) == pytest.approx(roomy.losses(name), rel=1e-4), (
            share,
            limit,
            reserved,
            used,
            capped.notes,
        )
        assert difference(capped.adapter(name), roomy.adapter(name)) < 1e-3
        assert len(capped.reports[name]) == len(roomy.reports[name])
