import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune import storage
from vlmtune.config.settings import Settings
from vlmtune.packed.messages import FAILURE
from vlmtune.search import trial_results as results
from vlmtune.search.first_points import GRID
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.search.trial_results import TrialResult

ENDED = {"step": 8, "max_steps": 8, "seconds": 1.5, "tokens_per_second": 100.0, "peak_memory": 0.5}


def row(name: str, state: str, loss: float | None = None, **values: Any) -> TrialResult:
    metrics = {} if loss is None else {**ENDED, "eval_loss": loss, "checkpoint_path": f"/runs/{name}"}
    return TrialResult(name, values, state, metrics)


@pytest.mark.parametrize(
    ("metrics", "end", "state"),
    [
        ({"step": 8, "max_steps": 8}, End.LAST_REPORT, results.COMPLETE),
        ({"step": 2, "max_steps": 8}, End.STOPPED, results.PRUNED),
        ({"step": 8, "max_steps": 8}, End.DIVERGED, results.PRUNED),
        ({}, End.BUDGET, results.PRUNED),
        ({"infeasible": True}, End.LAST_REPORT, results.INFEASIBLE),
        ({"step": 2, "max_steps": 8}, End.ERROR, results.FAILED),
        ({}, End.ERROR, results.FAILED),
        ({FAILURE: "no such layer"}, End.LAST_REPORT, results.FAILED),
    ],
)
def test_state(metrics: dict[str, Any], end: End, state: str) -> None:
    assert results.state_of(SavedTrial(0, "a", {}, reports=[metrics] if metrics else [], end=end)) == state


@pytest.mark.parametrize(
    ("report", "diverged"),
    [
        ({"eval_loss": math.nan, "step": 2, "max_steps": 8}, True),
        ({"eval_loss": math.inf, "step": 2, "max_steps": 8}, True),
        ({"eval_loss": 90.0, "first_loss": 5.0, "step": 8, "max_steps": 8}, True),
        ({"eval_loss": 90.0, "first_loss": 5.0, "step": 4, "max_steps": 8}, False),
        ({"eval_loss": 6.0, "first_loss": 5.0, "step": 8, "max_steps": 8}, False),
        ({"eval_loss": 90.0, "step": 8, "max_steps": 8}, False),
        ({"eval_loss": math.nan, "infeasible": True}, False),
    ],
)
def test_which_trials_have_diverged(report: dict[str, Any], diverged: bool) -> None:
    assert results.has_diverged(report, "eval_loss") is diverged


@pytest.mark.parametrize(
    ("traceback", "reason"),
    [
        (
            'ray::f()\n  File "a.py", line 2\n    raise x\nvlmtune.errors.ModelError: there is no such layer',
            "there is no such layer",
        ),
        (
            "Training failed due to worker errors:\n[Rank 0]:\nTraceback (most recent call last):\n"
            "ValueError: two\nlines of it\n",
            "ValueError: two",
        ),
        (
            "ray.exceptions.ActorDiedError: The actor died\n\tclass_name: Worker\n",
            "ray.exceptions.ActorDiedError: The actor died",
        ),
        ("KeyError\n", "KeyError"),
        ("", "no reason is known"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(traceback: str, reason: str) -> None:
    assert results.failure_reason(traceback) == reason


def test_the_best_trial_ran_to_its_end_and_has_a_number() -> None:
    rows = [
        row("baseline", results.COMPLETE, 3.0),
        row("stopped", results.PRUNED, 1.0),
        row("diverged", results.COMPLETE, float("nan")),
        row("low", results.COMPLETE, 2.0),
        row("same", results.COMPLETE, 2.0),
        row("failed", results.FAILED),
    ]
    best = results.best_trial(rows, "eval_loss", "min")
    assert best is not None and best.trial_id == "low" and best.checkpoint == "/runs/low"
    highest = results.best_trial(rows, "eval_loss", "max")
    assert highest is not None and highest.trial_id == "baseline"
    assert results.best_trial(rows[1:3], "eval_loss", "min") is None


def test_the_table_keeps_types_where_trials_have_no_numbers(tmp_path: Path) -> None:
    rows = [
        row("a", results.COMPLETE, 3.0, lora_r=8, max_length=None, lora_target_modules=["q_proj"]),
        row("b", results.FAILED, lora_r=4, max_length=64, lora_target_modules="all-linear"),
    ]
    names = ["lora_r", "max_length", "lora_target_modules"]
    table = results.trials_table(rows, names, {"eval_loss": "min"})
    storage.write_table(table, str(tmp_path / "trials.parquet"))
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table.column_names == [
        "trial_id",
        *names,
        "origin",
        "state",
        "eval_loss",
        "steps",
        "seconds",
        "tokens_per_second",
        "peak_memory",
    ]
    assert table.schema.field("steps").type == table.schema.field("lora_r").type == pa.int64()
    assert table.to_pylist() == [
        {
            "trial_id": "a",
            "lora_r": 8,
            "max_length": None,
            "lora_target_modules": '["q_proj"]',
            "origin": GRID,
            "state": "COMPLETE",
            "eval_loss": 3.0,
            "steps": 8,
            "seconds": 1.5,
            "tokens_per_second": 100.0,
            "peak_memory": 0.5,
        },
        {
            "trial_id": "b",
            "lora_r": 4,
            "max_length": 64,
            "lora_target_modules": "all-linear",
            "origin": GRID,
            "state": "FAILED",
            "eval_loss": None,
            "steps": None,
            "seconds": None,
            "tokens_per_second": None,
            "peak_memory": None,
        },
    ]


def test_another_metric_has_a_column_too() -> None:
    rows = [TrialResult("a", {"lora_r": 8}, results.COMPLETE, {**ENDED, "eval_loss": 2.0, "train_loss": 1.0})]
    assert results.trials_table(rows, ["lora_r"], {"train_loss": "min"}).column_names[-2:] == [
        "peak_memory",
        "train_loss",
    ]
    assert results.trials_table(rows, ["lora_r"], {"seconds": "min"}).column_names.count("seconds") == 1


def test_the_settings_of_a_trial_are_the_configs_with_its_values() -> None:
    settings = Settings.from_flags({"lora_r": 8, "learning_rate": 1e-4})
    chosen = results.settings_of(row("a", results.COMPLETE, 1.0, lora_r=16), settings)
    assert (chosen.lora.r, chosen.training.learning_rate) == (16, 1e-4)


def test_the_front_holds_trials_that_no_other_dominates() -> None:
    found = [(1.0, 9.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (math.nan, 0.0), (2.0, 3.0)]
    rows = [
        TrialResult(
            f"t{number}", {"lora_r": number}, results.COMPLETE, {"eval_loss": loss, "seconds": seconds}
        )
        for number, (loss, seconds) in enumerate(found)
    ]
    rows.append(TrialResult("stopped", {"lora_r": 9}, results.PRUNED, {"eval_loss": 0.0, "seconds": 0.0}))
    objectives = {"eval_loss": "min", "seconds": "min"}
    assert [row.trial_id for row in results.pareto_front(rows, objectives)] == ["t0", "t1", "t4", "t6"], (
        "equals stand side by side"
    )
    assert [row.trial_id for row in results.pareto_front(rows, {"eval_loss": "min", "seconds": "max"})] == [
        "t0"
    ]
    assert results.trials_table(rows, ["lora_r"], objectives)["pareto"].to_pylist() == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert "pareto" not in results.trials_table(rows, ["lora_r"], {"eval_loss": "min"}).column_names
