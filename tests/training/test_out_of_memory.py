"""A step that does not fit in memory: tried again with fewer rows at a time, and the same step."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import Run, difference

from vlmtune.demo.models import write_model
from vlmtune.model.step import AcceleratedStep, Batch

RunLoop = Callable[..., Run]
OPTIONS = {"quantization": "none", "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}


def fail_above(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let steps of more than `most` rows at a time run out of memory after their backward pass; returns the
    sizes that were tried."""
    tried: list[int] = []
    whole = AcceleratedStep._run_parts

    def limited(self: AcceleratedStep, batch: Batch, rows: int, run: Any) -> list[torch.Tensor]:
        losses = whole(self, batch, rows, run)
        if torch.is_grad_enabled():
            tried.append(rows)
            if rows > most:
                raise torch.OutOfMemoryError("injected")
        return losses

    monkeypatch.setattr(AcceleratedStep, "_run_parts", limited)
    return tried


@pytest.mark.parametrize("name", ["mixed llava", "mixed mllama"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_memory_leaves_the_step_as_it_is(
    run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch, name: str, accumulation: int
):
    # Cached vision features would be freed first, which test_vision_cache.py is about.
    monkeypatch.setattr("vlmtune.training.loop.room_for_features", lambda *_: 0.0)
    options = OPTIONS | {"gradient_accumulation_steps": accumulation}
    undisturbed = run_loop(name, **options)
    tried = fail_above(monkeypatch, 1)
    run = run_loop(name, **options)
    assert tried[:3] == [4, 2, 1]
    assert set(tried[3:]) == {1}
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    assert difference(run.adapter(), undisturbed.adapter()) < 1e-4
    assert [step["note"] for step in run.steps if "note" in step] == [
        "out of GPU memory with 4 rows at a time: continuing with 2, the step stays the same",
        "out of GPU memory with 2 rows at a time: continuing with 1, the step stays the same",
    ]


def test_one_row_that_does_not_fit_ends_the_run(run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch):
    fail_above(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        run_loop("mixed llava", **OPTIONS)


def test_an_evaluation_that_does_not_fit_is_the_same_evaluation(
    run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch
):
    options = OPTIONS | {"per_device_eval_batch_size": 5}
    undisturbed = run_loop("mixed llava", **options)
    whole = AcceleratedStep._run_parts

    def limited(self: AcceleratedStep, batch: Batch, rows: int, run: Any) -> list[torch.Tensor]:
        losses = whole(self, batch, rows, run)
        if not torch.is_grad_enabled() and rows > 2:
            raise torch.OutOfMemoryError("injected")
        return losses

    monkeypatch.setattr(AcceleratedStep, "_run_parts", limited)
    run = run_loop("mixed llava", **options)
    assert [report["eval_loss"] for report in run.reports] == pytest.approx(
        [r["eval_loss"] for r in undisturbed.reports], rel=1e-5
    )
    assert [step["note"].split(":")[1] for step in run.steps if "note" in step] == [
        " continuing with 3, the step stays the same",
        " continuing with 2, the step stays the same",
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_fewer_rows_at_a_time_are_the_same_step(run_loop: RunLoop, size: int):
    whole = run_loop("mixed llava", **OPTIONS)
    parts = run_loop("mixed llava", **OPTIONS, micro_batch_size=size)
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert difference(parts.adapter(), whole.adapter()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory is that of a GPU")
def test_a_gpu_that_is_too_small_for_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import train_step

    write_model("llava", tmp_path)
    case: dict[str, Any] = {"batch": 256, "tokens": 128, "image": True}
    options = {
        "dtype": "float32",
        "bf16": "false",
        "cuda_graphs": "false",
        "torch_compile": "false",
        "gradient_checkpointing": "false",
    }
    case["ours"] = options | {"lora_dropout": "0"}
    torch.cuda.empty_cache()
    roomy = train_step.ours(str(tmp_path), case, 6)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * roomy["peak_gb"] * 2**30 / total)
    try:
        capped = train_step.ours(str(tmp_path), case, 6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(
        "out of GPU memory with 256 rows at a time: continuing with 128" in note for note in capped["notes"]
    )
    assert capped["losses"] == pytest.approx(roomy["losses"], rel=1e-4)
