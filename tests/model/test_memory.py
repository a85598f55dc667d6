"""The estimate of GPU memory against what was measured (docs/benchmarks.md)."""

from dataclasses import replace
from typing import Any

import pytest
import transformers as tf
from memory_kit import STEP, llava_7b

from vlmtune.model.choose_plan import PlanOptions, choose_plan
from vlmtune.model.lora_targets import target_modules
from vlmtune.model.memory import GB, StepLoad, StepPlan, estimate_memory
from vlmtune.model.shapes import model_shapes
from vlmtune.model_ref import model_on_meta
from vlmtune.training.step_plan import vision_tokens


@pytest.mark.parametrize(
    ("batch", "plan", "measured"),
    [
        (8, StepPlan(dequantized=True, checkpointing=False, micro_batch_size=8, compiled=True), 36.0),
        (1, StepPlan(dequantized=True, checkpointing=False, micro_batch_size=1, compiled=True), 16.6),
        (
            8,
            StepPlan(dequantized=False, checkpointing=True, micro_batch_size=8, compiled=True, offload=True),
            5.2,
        ),
        (8, StepPlan(dequantized=False, checkpointing=True, micro_batch_size=4, compiled=True), 5.3),
    ],
)
def test_estimates_are_within_15_percent_of_what_was_measured(batch: int, plan: StepPlan, measured: float):
    assert estimate_memory(llava_7b(), replace(STEP, batch=batch), plan).step_bytes / GB == pytest.approx(
        measured, rel=0.15
    )


def test_images_that_cross_attention_reads():
    """Llama-3.2-11B-Vision in 8 bits, 2 rows of 512 tokens."""
    model = model_on_meta(tf.MllamaConfig(vision_config=tf.MllamaVisionConfig(image_size=560)))
    found = model_shapes(model, target_modules(model, None, lora_vision=False))
    assert vision_tokens(model.config, 0) == (True, 0)
    assert vision_tokens(model.config, 2) == (True, 2 * 4 * 1601)
    load = StepLoad("int8", batch=2, length=512, labelled_tokens=40, cross_attention_tokens=0, lora_rank=16)
    plan = StepPlan(dequantized=True, checkpointing=False, micro_batch_size=2, compiled=True)
    assert estimate_memory(found, load, plan).step_bytes / GB == pytest.approx(24.7, rel=0.07)  # measured
    eager = replace(load, length=384, labelled_tokens=60)  # train.py with the shipped config
    assert estimate_memory(found, eager, replace(plan, compiled=False)).step_bytes / GB == pytest.approx(
        24.7, rel=0.15
    )  # measured
    with_images = replace(load, cross_attention_tokens=4 * 1601, vision_tokens=4 * 1601)
    tower = 40 * 2 * 4 * 1601 * 1280 * 2  # the outputs of its 40 layers, bfloat16
    assert (
        estimate_memory(found, with_images, plan).step_bytes
        > estimate_memory(found, load, plan).step_bytes + tower
    )
    assert (
        choose_plan(found, replace(with_images, batch=8), 139 * GB, PlanOptions()).eval_micro_batch_size == 8
    )
    assert choose_plan(found, with_images, 139 * GB, PlanOptions()).eval_micro_batch_size == 2, (
        "no more than are trained at once"
    )


def test_recorded_steps_need_memory_of_their_own():
    """16 packed trials of one row on a GPU of 80 GB: 16 rows fit once, and 8 a second time for what is
    recorded."""
    load = replace(STEP, batch=16, packed_adapters=16)
    recorded, plain = (
        choose_plan(llava_7b(), load, 79 * GB, PlanOptions()),
        choose_plan(llava_7b(), load, 79 * GB, PlanOptions(can_capture=False)),
    )
    assert (recorded.micro_batch_size, plain.micro_batch_size) == (8, 16)
    found = estimate_memory(llava_7b(), load, recorded)
    assert found.further_graphs == found.activations + found.temporary
    assert found.required_bytes == found.step_bytes + found.further_graphs
    assert found.text().startswith(f"{found.step_bytes / GB:.1f} GB (base")
    assert found.text().endswith(f"), and up to {found.further_graphs / GB:.1f} GB for further CUDA graphs,")
    assert estimate_memory(llava_7b(), load, plain).further_graphs == 0


def test_more_of_anything_takes_more():
    plan = StepPlan(dequantized=False, checkpointing=False, micro_batch_size=8, compiled=True)
    least = estimate_memory(llava_7b(), STEP, plan).step_bytes
    changes: list[dict[str, Any]] = [
        {"length": 700},
        {"vision_tokens": 1152},
        {"lora_rank": 64},
        {"quantization": "int8"},
        {"compute_bytes": 4},
    ]
    for change in changes:
        more = replace(STEP, **change)
        assert estimate_memory(llava_7b(), more, plan).step_bytes > least
    assert estimate_memory(llava_7b(), replace(STEP, dropout=False), plan).step_bytes < least
    assert estimate_memory(llava_7b(), STEP, replace(plan, compiled=False)).step_bytes > least
