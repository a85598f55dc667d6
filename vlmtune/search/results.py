"""What a search found: a row per trial, the best one, and its adapter."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray import tune

from vlmtune.compat.ray_tune import trials_of
from vlmtune.config.settings import Settings
from vlmtune.evaluation.metrics import METRICS as ANSWER_METRICS
from vlmtune.packed.messages import FAILURE
from vlmtune.search.trial import point
from vlmtune.storage import filesystem

STATES = COMPLETE, PRUNED, FAILED, INFEASIBLE = "COMPLETE", "PRUNED", "FAILED", "INFEASIBLE"
MEASURED = (
    pa.field("eval_loss", pa.float64()),
    pa.field("steps", pa.int64()),
    pa.field("seconds", pa.float64()),
    pa.field("tokens_per_second", pa.float64()),
    pa.field("peak_memory", pa.float64(), metadata={"unit": "GB of 2**30 bytes"}),
)


Curves = dict[str, list[tuple[float, float]]]  # (step, metric) of a trial's reports, by its id


@dataclass(frozen=True)
class TrialRow:
    """One trial: its values, how it ended, its last report."""

    trial_id: str
    values: dict[str, Any]
    state: str
    metrics: dict[str, Any]
    error: str | None = None

    @property
    def checkpoint(self) -> str:
        return str(self.metrics["checkpoint_path"])


def state_of(metrics: dict[str, Any] | None, *, failed: bool) -> str:
    """How a trial ended, from its last report. One that was stopped before its first is PRUNED."""
    metrics = metrics or {}
    if failed or FAILURE in metrics:
        return FAILED
    if metrics.get("infeasible"):
        return INFEASIBLE
    return COMPLETE if "step" in metrics and metrics["step"] >= metrics["max_steps"] else PRUNED


def reason(traceback: str) -> str:
    """Why a trial failed, in a line: the last of its traceback that names an exception. A mistake of the
    user's is said as it is."""
    lines = [line for line in traceback.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(: |$)", line)]
    return re.sub(r"^vlmtune\.errors\.\w+: ", "", (named or lines or ["no reason is known"])[-1].strip())


def proposed(experiment_tag: str) -> int:
    """When a trial was proposed: the number that Tune's tag begins with. In Tune's own lists a trial that
    was started again comes last."""
    return int(experiment_tag.partition("_")[0])


def rows_of(grid: tune.ResultGrid) -> list[TrialRow]:
    """The trials of a search in the order in which they were proposed."""
    trials = trials_of(grid)  # the results do not have the tag of a trial that never reported
    rows = []
    for index in sorted(range(len(grid)), key=lambda one: proposed(trials[one].experiment_tag)):
        result = grid[index]
        metrics = dict(result.metrics or {})
        state = state_of(metrics, failed=result.error is not None)
        error = reason(str(result.error)) if result.error else metrics.get(FAILURE)
        rows.append(TrialRow(trial_id_of(result), point(result.config or {}), state, metrics, error))
    return rows


def curves_of(grid: tune.ResultGrid, metric: str) -> Curves:
    """(step, metric) of every report of the trials, by trial_id; those whose metric is no number are left
    out."""
    curves: Curves = {}
    for result in (grid[index] for index in range(len(grid))):
        frame = result.metrics_dataframe
        if frame is None or not {"step", metric} <= set(frame.columns):
            continue
        kept = frame[["step", metric]].astype(float)
        kept = kept[np.isfinite(kept).all(axis=1)].drop_duplicates(
            "step", keep="last"
        )  # a trial that was begun anew repeats a report
        curves[trial_id_of(result)] = [(step, value) for step, value in kept.itertuples(index=False)]
    return curves


def trial_id_of(result: tune.Result) -> str:
    return str(result.path).rstrip("/").rsplit("/", 1)[-1]


def best_of(rows: list[TrialRow], metric: str, mode: str) -> TrialRow | None:
    """The best trial that ran to its end, the first of equals; or None."""
    sign = 1 if mode == "min" else -1
    finished = [
        row for row in rows if row.state == COMPLETE and math.isfinite(row.metrics.get(metric, math.nan))
    ]
    return min(finished, key=lambda row: sign * row.metrics[metric], default=None)


def mode_of(name: str) -> str:
    """Whether more or less of a number that trials report is better; metrics of answers tell it
    themselves."""
    if name in ANSWER_METRICS:
        return ANSWER_METRICS[name].mode
    return "max" if name.endswith("_per_second") else "min"


def front_of(rows: Sequence[TrialRow], objectives: Mapping[str, str]) -> list[TrialRow]:
    """The trials that ran to their end and that no other one beats in one of the objectives and equals in
    the rest: the Pareto front.

    Args:
        objectives: the mode of each metric, "min" or "max".
    """

    def losses(row: TrialRow) -> list[float]:
        return [
            row.metrics.get(name, math.nan) * (1 if mode == "min" else -1)
            for name, mode in objectives.items()
        ]

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))

    ended = [(row, losses(row)) for row in rows if row.state == COMPLETE]
    finite = [(row, mine) for row, mine in ended if all(map(math.isfinite, mine))]
    return [row for row, mine in finite if not any(beats(theirs, mine) for _, theirs in finite)]


def table(rows: list[TrialRow], names: list[str], objectives: Mapping[str, str]) -> pa.Table:
    """A row per trial: trial_id, every searched value, state, eval_loss, steps, seconds, tokens_per_second,
    peak_memory, the objectives,
    and with several of them `pareto`, whether the trial is on their front."""
    columns = {"trial_id": pa.array([row.trial_id for row in rows], pa.string())}
    columns |= {name: _values([row.values.get(name) for row in rows]) for name in names}
    columns["state"] = pa.array([row.state for row in rows], pa.string())
    known = [field.name for field in MEASURED]
    for field in (*MEASURED, *(pa.field(name, pa.float64()) for name in objectives if name not in known)):
        reported = "step" if field.name == "steps" else field.name
        columns[field.name] = pa.array([row.metrics.get(reported) for row in rows], field.type)
    if len(objectives) > 1:
        front = front_of(rows, objectives)
        columns["pareto"] = pa.array([any(row is one for one in front) for row in rows], pa.bool_())
    return pa.table(columns)


def _values(values: list[Any]) -> pa.Array:
    """A column of one option's values; lists and mappings as JSON, so that a column has one type."""
    return pa.array([json.dumps(value) if isinstance(value, list | dict) else value for value in values])


def write_table(rows: list[TrialRow], names: list[str], folder: str, objectives: Mapping[str, str]) -> None:
    """`trials.parquet` in the search's output folder."""
    fs, inner = filesystem(folder)
    pq.write_table(table(rows, names, objectives), f"{inner}/trials.parquet", filesystem=fs)


def settings_of(row: TrialRow, settings: Settings) -> Settings:
    """The settings that train this trial's adapter alone, with train.py."""
    return settings.replace(**row.values)
