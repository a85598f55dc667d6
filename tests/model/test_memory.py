"""The estimate of GPU memory against what was measured (docs/benchmarks.md), and the choice that follows
from it."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from vlmtune.errors import DoesNotFitError
from vlmtune.model.lora import target_modules
from vlmtune.model.memory import GB, Load, Plan, Shapes, choose, estimate, plan_text, shapes
from vlmtune.model_ref import ModelRef, outline
from vlmtune.training.needs import vision_tokens

STEP = Load(quantization="nf4", batch=8, length=640, labelled=40, image_tokens=0, rank=16, vision_tokens=576)


@cache
def llava_7b() -> Shapes:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=tf.LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        image_token_index=32000,
    )
    model = outline(config)
    return shapes(model, target_modules(model, None, lora_vision=False))


def test_sizes_of_llava_7b():
    found = llava_7b()
    assert (found.layers, found.hidden, found.intermediate, found.vocabulary, found.cross_layers) == (
        32,
        4096,
        11008,
        32064,
        0,
    )
    assert found.decoder == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.adapter == 32 * 4 * 2 * 4096
    assert found.quantized + found.other == pytest.approx(7.06e9, rel=2e-3)


@pytest.mark.parametrize(
    ("batch", "plan", "measured"),
    [
        (8, Plan(resident=True, checkpointing=False, micro_batch=8, compiled=True), 36.0),
        (1, Plan(resident=True, checkpointing=False, micro_batch=1, compiled=True), 16.6),
        (8, Plan(resident=False, checkpointing=True, micro_batch=8, compiled=True, offload=True), 5.2),
        (8, Plan(resident=False, checkpointing=True, micro_batch=4, compiled=True), 5.3),
    ],
)
def test_estimates_are_within_15_percent_of_what_was_measured(batch: int, plan: Plan, measured: float):
    assert estimate(llava_7b(), replace(STEP, batch=batch), plan).total / GB == pytest.approx(
        measured, rel=0.15
    )


def test_pictures_that_cross_attention_reads():
    """Llama-3.2-11B-Vision in 8 bits, 2 rows of 512 tokens."""
    model = outline(tf.MllamaConfig(vision_config=tf.MllamaVisionConfig(image_size=560)))
    found = shapes(model, target_modules(model, None, lora_vision=False))
    assert vision_tokens(model.config, 0) == (True, 0)
    assert vision_tokens(model.config, 2) == (True, 2 * 4 * 1601)
    load = Load("int8", batch=2, length=512, labelled=40, image_tokens=0, rank=16)
    plan = Plan(resident=True, checkpointing=False, micro_batch=2, compiled=True)
    assert estimate(found, load, plan).total / GB == pytest.approx(24.7, rel=0.07)  # measured
    eager = replace(load, length=384, labelled=60)  # train.py with the shipped config
    assert estimate(found, eager, replace(plan, compiled=False)).total / GB == pytest.approx(
        24.7, rel=0.15
    )  # measured
    pictured = replace(load, image_tokens=4 * 1601, vision_tokens=4 * 1601)
    tower = 40 * 2 * 4 * 1601 * 1280 * 2  # the outputs of its 40 layers, bfloat16
    assert estimate(found, pictured, plan).total > estimate(found, load, plan).total + tower
    assert choose(found, replace(pictured, batch=8), 139 * GB).evaluated == 8
    assert choose(found, pictured, 139 * GB).evaluated == 2, "no more than are trained at once"


@pytest.mark.parametrize(
    ("capacity", "resident", "checkpointing", "micro_batch", "graphs"),
    [
        (139, True, False, 8, True),
        (50, True, False, 4, True),
        (30, True, False, 4, False),
        (17, False, False, 4, False),
        (8, False, True, 8, False),
    ],
)
def test_the_fastest_plan_that_fits(
    capacity: float, resident: bool, checkpointing: bool, micro_batch: int, graphs: bool
):
    plan = choose(llava_7b(), STEP, capacity * GB)
    assert (plan.resident, plan.checkpointing, plan.micro_batch, plan.graphs) == (
        resident,
        checkpointing,
        micro_batch,
        graphs,
    )


def test_rows_are_not_split_below_2048_tokens_to_record_them():
    """Two rows whose activations fit once: they are recorded where there happens to be room, and not one by
    one."""
    for given in ({}, {"checkpointing": False}, {"micro_batch": 2}):
        plan = choose(llava_7b(), replace(STEP, batch=2), 24 * GB, **given)
        assert (plan.resident, plan.checkpointing, plan.micro_batch, plan.graphs) == (True, False, 2, False)


def test_recorded_steps_need_memory_of_their_own():
    """16 packed trials of one row on a GPU of 80 GB: 16 rows fit once, and 8 a second time for what is
    recorded."""
    load = replace(STEP, batch=16, packed=16)
    recorded, plain = choose(llava_7b(), load, 79 * GB), choose(llava_7b(), load, 79 * GB, graphs=False)
    assert (recorded.micro_batch, plain.micro_batch) == (8, 16)
    found = estimate(llava_7b(), load, recorded)
    assert found.graphs == found.activations + found.temporary
    assert found.reserved == found.total + found.graphs
    assert found.text().startswith(f"{found.total / GB:.1f} GB (base")
    assert found.text().endswith(f"), and up to {found.graphs / GB:.1f} GB for further CUDA graphs,")
    assert estimate(llava_7b(), load, plain).graphs == 0


def test_what_is_given_is_kept():
    given: dict[str, Any] = {"resident": False, "checkpointing": True, "micro_batch": 2}
    plan = choose(llava_7b(), STEP, 139 * GB, **given)
    assert {name: getattr(plan, name) for name in given} == given


def test_what_cannot_fit_is_refused_with_numbers():
    with pytest.raises(
        DoesNotFitError,
        match=r"^not enough GPU memory: 1 of 8 rows at a time, base in int8, with .* still takes about",
    ) as caught:
        choose(llava_7b(), replace(STEP, quantization="int8"), 6.5 * GB)
    assert str(caught.value).endswith("--quantization nf4 would fit")
    with pytest.raises(DoesNotFitError, match=r"a GPU with \d\.\d GB would do$"):
        choose(llava_7b(), STEP, 2 * GB)


def test_more_of_anything_takes_more():
    plan = Plan(resident=False, checkpointing=False, micro_batch=8, compiled=True)
    least = estimate(llava_7b(), STEP, plan).total
    changes: list[dict[str, Any]] = [
        {"length": 700},
        {"vision_tokens": 1152},
        {"rank": 64},
        {"quantization": "int8"},
        {"compute_bytes": 4},
    ]
    for change in changes:
        more = replace(STEP, **change)
        assert estimate(llava_7b(), more, plan).total > least
    assert estimate(llava_7b(), replace(STEP, dropout=False), plan).total < least
    assert estimate(llava_7b(), STEP, replace(plan, compiled=False)).total > least


def test_weights_are_those_of_a_loaded_model(tmp_path):
    from vlmtune.demo.models import write_model
    from vlmtune.model.base import load_base

    write_model("llava", tmp_path)
    model = load_base(
        ModelRef(str(tmp_path)), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    found = shapes(outline(ModelRef(str(tmp_path)).config()), [])
    assert found.quantized + found.other == sum(parameter.numel() for parameter in model.parameters())


def test_a_plan_in_words():
    plan = Plan(resident=True, checkpointing=False, micro_batch=4, compiled=True)
    assert (
        plan_text(plan, STEP)
        == "4 of 8 rows at a time, base held in the type it computes in, no gradient checkpointing"
    )
