"""The trials of a finished search: how each ended, the best one, the Pareto front, and the table."""

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
from vlmtune.packed.messages import FAILURE
from vlmtune.search.first_points import GRID
from vlmtune.search.isolated_trial import PROPOSAL, trial_values
from vlmtune.storage import filesystem
from vlmtune.training.best_evaluation import LAST, LAST_CHECKPOINT, has_ended

STATES = COMPLETE, PRUNED, FAILED, INFEASIBLE = "COMPLETE", "PRUNED", "FAILED", "INFEASIBLE"
# Columns of the table that every search has.
MEASURED = (
    pa.field("eval_loss", pa.float64()),
    pa.field("steps", pa.int64()),
    pa.field("seconds", pa.float64()),
    pa.field("tokens_per_second", pa.float64()),
    pa.field("peak_memory", pa.float64(), metadata={"unit": "GB of 2**30 bytes"}),
)

Curves = dict[str, list[tuple[float, float]]]  # (step, metric) of each report of a trial, by trial_id


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        trial_id: the name of its folders.
        values: its searched values, by flag name.
        state: one of STATES.
        metrics: its last report.
        error: why it failed, if so; one line.
        proposal: where its values come from, see `first_points`.
    """

    trial_id: str
    values: dict[str, Any]
    state: str
    metrics: dict[str, Any]
    error: str | None = None
    proposal: str = GRID

    @property
    def checkpoint(self) -> str:
        """Folder or URI of its checkpoint that counts: of its best evaluation, or else the last."""
        return str(self.metrics["checkpoint_path"])

    @property
    def last_checkpoint(self) -> str:
        """Folder or URI of the checkpoint after its last step."""
        return str(self.metrics.get(LAST_CHECKPOINT) or self.checkpoint)

    def metric(self, name: str) -> float:
        """A metric of its last report; NaN if it has none."""
        value = self.metrics.get(name, math.nan)
        return float(value) if isinstance(value, int | float) else math.nan


def state_of(metrics: Mapping[str, Any] | None, *, failed: bool) -> str:
    """How a trial ended, from its last report. A trial that was stopped before its first report is PRUNED."""
    metrics = metrics or {}
    if failed or FAILURE in metrics:
        return FAILED
    if metrics.get("infeasible"):
        return INFEASIBLE
    return COMPLETE if "step" in metrics and has_ended(metrics) else PRUNED


def failure_reason(traceback: str) -> str:
    """Why a trial failed, in one line: the last line of its traceback that names an exception.

    The message of a UserError stands alone, without the exception's name.
    """
    lines = [line for line in traceback.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(: |$)", line)]
    return re.sub(r"^vlmtune\.errors\.\w+: ", "", (exceptions or lines or ["no reason is known"])[-1].strip())


def proposal_number(experiment_tag: str) -> int:
    """The position of a trial among all proposed trials: the number at the start of Ray Tune's tag.

    In Tune's own lists, a trial that was restarted comes last.
    """
    return int(experiment_tag.partition("_")[0])


def trial_results(grid: tune.ResultGrid) -> list[TrialResult]:
    """The trials of a search in the order in which they were proposed."""
    trials = trials_of(grid)  # the results of trials that never reported have no tag
    results = []
    for index in sorted(range(len(grid)), key=lambda index: proposal_number(trials[index].experiment_tag)):
        result = grid[index]
        metrics = dict(result.metrics or {})
        state = state_of(metrics, failed=result.error is not None)
        error = failure_reason(str(result.error)) if result.error else metrics.get(FAILURE)
        config = result.config or {}
        values, proposal = trial_values(config), config.get(PROPOSAL, GRID)
        results.append(TrialResult(trial_id_of(result), values, state, metrics, error, proposal))
    return results


def curves_of(grid: tune.ResultGrid, metric: str) -> Curves:
    """(step, metric) of every evaluation of each trial, by trial_id. NaN and infinite values are left out."""
    curves: Curves = {}
    for result in (grid[index] for index in range(len(grid))):
        frame = result.metrics_dataframe
        if frame is None or not {"step", metric} <= set(frame.columns):
            continue
        # With `load_best_model_at_end` a report has the metric of the best evaluation so far.
        own = f"{LAST}{metric}" if f"{LAST}{metric}" in frame.columns else metric
        reports = frame[["step", own]].astype(float)
        # A restarted trial reports some steps twice.
        reports = reports[np.isfinite(reports).all(axis=1)].drop_duplicates("step", keep="last")
        curves[trial_id_of(result)] = [(step, value) for step, value in reports.itertuples(index=False)]
    return curves


def trial_id_of(result: tune.Result) -> str:
    return str(result.path).rstrip("/").rsplit("/", 1)[-1]


def best_trial(results: Sequence[TrialResult], metric: str, mode: str) -> TrialResult | None:
    """The best complete trial with a finite metric, the first one of equals; None if there is none."""
    sign = 1 if mode == "min" else -1
    candidates = [
        trial for trial in results if trial.state == COMPLETE and math.isfinite(trial.metric(metric))
    ]
    return min(candidates, key=lambda trial: sign * trial.metrics[metric], default=None)


def pareto_front(results: Sequence[TrialResult], objectives: Mapping[str, str]) -> list[TrialResult]:
    """The complete trials that no other trial dominates.

    A trial dominates another if it is better in at least one objective and worse in none.

    Args:
        objectives: the mode of each metric, "min" or "max".
    """

    def losses(result: TrialResult) -> list[float]:
        return [result.metric(name) * (1 if mode == "min" else -1) for name, mode in objectives.items()]

    def dominates(first: list[float], second: list[float]) -> bool:
        return first != second and all(a <= b for a, b in zip(first, second, strict=True))

    candidates = [(trial, losses(trial)) for trial in results if trial.state == COMPLETE]
    finite = [(trial, values) for trial, values in candidates if all(map(math.isfinite, values))]
    return [trial for trial, values in finite if not any(dominates(other, values) for _, other in finite)]


def trials_table(
    results: Sequence[TrialResult], names: Sequence[str], objectives: Mapping[str, str]
) -> pa.Table:
    """One row for each trial.

    Columns: trial_id, every searched value, proposal, state, the MEASURED columns, and the other objectives.
    With several objectives also `pareto`: whether the trial is on their Pareto front.
    """
    columns = {"trial_id": pa.array([trial.trial_id for trial in results], pa.string())}
    columns |= {name: _value_column([trial.values.get(name) for trial in results]) for name in names}
    columns["proposal"] = pa.array([trial.proposal for trial in results], pa.string())
    columns["state"] = pa.array([trial.state for trial in results], pa.string())
    measured = [field.name for field in MEASURED]
    others = [pa.field(name, pa.float64()) for name in objectives if name not in measured]
    for field in (*MEASURED, *others):
        reported_as = "step" if field.name == "steps" else field.name
        columns[field.name] = pa.array([trial.metrics.get(reported_as) for trial in results], field.type)
    if len(objectives) > 1:
        front = pareto_front(results, objectives)
        columns["pareto"] = pa.array(
            [any(trial is other for other in front) for trial in results], pa.bool_()
        )
    return pa.table(columns)


def _value_column(values: Sequence[Any]) -> pa.Array:
    """The values of one option; lists and mappings as JSON, so that the column has one type."""
    return pa.array([json.dumps(value) if isinstance(value, list | dict) else value for value in values])


def write_table(table: pa.Table, path: str) -> None:
    """Write the table of trials as Parquet to a path or URI."""
    files, inner = filesystem(path)
    pq.write_table(table, inner, filesystem=files)


def settings_of(result: TrialResult, settings: Settings) -> Settings:
    """The settings with which train.py trains this trial's adapter alone."""
    return settings.replace(**result.values)
