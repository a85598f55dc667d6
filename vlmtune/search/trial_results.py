"""The trials of a finished search: how each ended, the best one, the Pareto front, and the table."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vlmtune.config.settings import Settings
from vlmtune.packed.messages import BEST_CHECKPOINT, FAILURE, REASON
from vlmtune.search.first_points import GRID
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.training.best_evaluation import LAST, LAST_CHECKPOINT, ran_to_its_end
from vlmtune.training.meter import FIRST_LOSS

STATES = COMPLETE, PRUNED, FAILED, INFEASIBLE = "COMPLETE", "PRUNED", "FAILED", "INFEASIBLE"
# A run has diverged if its last loss is this many times its first one. The first loss is that of the
# untrained base on a single batch, so it varies; a model that merely overfits stays far below twice that
# loss.
DIVERGED_FACTOR = 2.0
# Columns of measurements that the table of every search has.
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
        error: why it failed or does not fit in memory, in one line; None if neither is so.
        origin: where its values come from, see `first_points`.
        end: what ended it.
    """

    trial_id: str
    values: dict[str, Any]
    state: str
    metrics: dict[str, Any]
    error: str | None = None
    origin: str = GRID
    end: End | None = None

    @property
    def checkpoint(self) -> str:
        """Folder or URI of its best checkpoint; of its last one without load_best_model_at_end."""
        return str(self.metrics[BEST_CHECKPOINT])

    @property
    def last_checkpoint(self) -> str:
        """Folder or URI of the checkpoint after its last step."""
        return str(self.metrics.get(LAST_CHECKPOINT) or self.checkpoint)

    def metric(self, name: str) -> float:
        """A metric of its last report; NaN if the report lacks it."""
        value = self.metrics.get(name, math.nan)
        return float(value) if isinstance(value, int | float) else math.nan


def state_of(trial: SavedTrial) -> str:
    """The state of a trial that has ended. It is PRUNED if it diverged or was stopped early."""
    metrics = trial.last_report
    if trial.end in (End.ERROR, End.LOST) or FAILURE in metrics:
        return FAILED
    if metrics.get("infeasible"):
        return INFEASIBLE
    if trial.end is End.DIVERGED:
        return PRUNED
    return COMPLETE if "step" in metrics and ran_to_its_end(metrics) else PRUNED


def has_diverged(report: Mapping[str, Any], metric: str) -> bool:
    """Whether a trial's metric is NaN or infinite, or its loss at the end is far above its first one."""
    if report.get("infeasible") or FAILURE in report:
        return False
    if not math.isfinite(report[metric]):
        return True
    ended = ran_to_its_end(report)
    first, last = report.get(FIRST_LOSS, math.nan), report.get("eval_loss", math.nan)
    return bool(ended and last > DIVERGED_FACTOR * first)


def failure_reason(traceback: str) -> str:
    """Why a trial failed, in one line: the last line of its traceback that names an exception.

    The message of a UserError is given without the exception's name.
    """
    lines = [line for line in traceback.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(: |$)", line)]
    return re.sub(r"^vlmtune\.errors\.\w+: ", "", (exceptions or lines or ["no reason is known"])[-1].strip())


def trial_results(trials: Sequence[SavedTrial]) -> list[TrialResult]:
    """How each trial ended, in the order in which they were proposed."""
    results = []
    for trial in sorted(trials, key=lambda one: one.number):
        metrics = trial.last_report
        reason = trial.error or metrics.get(FAILURE) or metrics.get(REASON)
        state, end, origin = state_of(trial), trial.end, trial.origin
        results.append(TrialResult(trial.trial_id, trial.values, state, metrics, reason, origin, end))
    return results


def curves_of(trials: Sequence[SavedTrial], metric: str) -> Curves:
    """(step, metric) of every evaluation of each trial, by trial_id. NaN and infinite values are left out."""
    curves: Curves = {}
    for trial in trials:
        # With `load_best_model_at_end`, a report's metric is that of the best evaluation so far. The metric
        # of the evaluation itself then has the prefix LAST.
        measured = [one for one in trial.reports if "step" in one and metric in one]
        points = [(one["step"], one.get(f"{LAST}{metric}", one[metric])) for one in measured]
        if points:
            curves[trial.trial_id] = [point for point in points if math.isfinite(point[1])]
    return curves


def best_trial(results: Sequence[TrialResult], metric: str, mode: str) -> TrialResult | None:
    """The best complete trial with a finite metric (of equal ones the first); None if there is none."""
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

    Columns: trial_id, every searched value, origin, state, the MEASURED columns, and the other objectives.
    With several objectives also `pareto`: whether the trial is on their Pareto front.
    """
    columns = {"trial_id": pa.array([trial.trial_id for trial in results], pa.string())}
    columns |= {name: _value_column([trial.values.get(name) for trial in results]) for name in names}
    columns["origin"] = pa.array([trial.origin for trial in results], pa.string())
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


def settings_of(result: TrialResult, settings: Settings) -> Settings:
    """The settings with which train.py trains this trial's adapter alone."""
    return settings.replace(**result.values)
