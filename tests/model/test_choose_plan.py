"""The plan that follows from the estimate of memory."""

from dataclasses import replace
from typing import Any

import pytest
from memory_kit import STEP, llava_7b

from vlmtune.errors import DoesNotFitError
from vlmtune.model.choose_plan import PlanOptions, choose_plan, halves, plan_text
from vlmtune.model.memory import GB, StepPlan


@pytest.mark.parametrize(
    ("capacity", "dequantized", "checkpointing", "micro_batch_size", "graphs"),
    [
        (139, True, False, 8, True),
        (50, True, False, 4, True),
        (30, True, False, 4, False),
        (17, False, False, 4, False),
        (8, False, True, 8, False),
    ],
)
def test_the_fastest_plan_that_fits(
    capacity: float, dequantized: bool, checkpointing: bool, micro_batch_size: int, graphs: bool
):
    plan = choose_plan(llava_7b(), STEP, capacity * GB, PlanOptions())
    assert (plan.dequantized, plan.checkpointing, plan.micro_batch_size, plan.room_for_graphs) == (
        dequantized,
        checkpointing,
        micro_batch_size,
        graphs,
    )


def test_rows_are_not_split_below_2048_tokens_to_record_them():
    """Two rows whose activations fit once: they are recorded where there happens to be room, and not one by
    one."""
    for given in ({}, {"checkpointing": False}, {"micro_batch_size": 2}):
        plan = choose_plan(llava_7b(), replace(STEP, batch=2), 24 * GB, PlanOptions(**given))
        assert (plan.dequantized, plan.checkpointing, plan.micro_batch_size, plan.room_for_graphs) == (
            True,
            False,
            2,
            False,
        )


def test_what_is_given_is_kept():
    given: dict[str, Any] = {"dequantized": False, "checkpointing": True, "micro_batch_size": 2}
    plan = choose_plan(llava_7b(), STEP, 139 * GB, PlanOptions(**given))
    assert {name: getattr(plan, name) for name in given} == given


def test_what_cannot_fit_is_refused_with_numbers():
    with pytest.raises(
        DoesNotFitError,
        match=r"^not enough GPU memory: 1 of 8 rows at a time, base in int8, with .* still takes about",
    ) as caught:
        choose_plan(llava_7b(), replace(STEP, quantization="int8"), 6.5 * GB, PlanOptions())
    assert str(caught.value).endswith("--quantization nf4 would fit")
    with pytest.raises(DoesNotFitError, match=r"a GPU with \d\.\d GB would do$"):
        choose_plan(llava_7b(), STEP, 2 * GB, PlanOptions())


def test_a_plan_in_words():
    plan = StepPlan(dequantized=True, checkpointing=False, micro_batch_size=4, compiled=True)
    assert (
        plan_text(plan, STEP)
        == "4 of 8 rows at a time, base held in the type it computes in, no gradient checkpointing"
    )


def test_sizes_are_halved_to_one() -> None:
    assert list(halves(12)) == [12, 6, 3, 2, 1]
