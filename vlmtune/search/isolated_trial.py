"""One isolated trial, in the process that Ray Tune starts for it: a Ray Train run whose reports go to Tune.

This module imports little, so that the process starts fast.
"""

from collections.abc import Mapping
from typing import Any

import ray.exceptions
from ray import tune
from ray.train import Checkpoint, WorkerGroupError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.model.memory import is_out_of_memory, memory_shortage
from vlmtune.packed.messages import REASON, TRIAL_ID, VALUES
from vlmtune.training.best_evaluation import LAST_CHECKPOINT, ran_to_its_end
from vlmtune.training.launch import run_on_ray
from vlmtune.training.meter import EVALUATION_NUMBER, evaluation_number

ORIGIN = "origin"  # in a trial's Tune config: where its values come from (see `first_points`)


def trial_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's searched values by flag name, from its Tune config."""
    return dict(config[VALUES])


def run_trial(
    config: dict[str, Any],
    *,
    settings: Settings,
    store: Store,
    output_dir: str,
    workers: int | tuple[int, int],
    use_gpu: bool,
    eval_steps: float | None,
) -> None:
    """Train with the search's settings and the trial's values, and report to Tune.

    A trial that does not fit in memory reports `infeasible`.

    Args:
        config: the trial's searched values under VALUES, and its id under TRIAL_ID.
        settings: the search's settings, without the trial's values.
        store: the prepared rows, with those of the other resolutions that trials may have.
        eval_steps: the option of that name; None if the trial is evaluated after every epoch.
    """
    trial_id, trial_settings = config[TRIAL_ID], settings.replace(**config[VALUES])
    try:
        outcome = run_on_ray(
            trial_settings,
            store.at(trial_settings.model.resolution),
            workers=workers,
            use_gpu=use_gpu,
            storage_path=f"{output_dir}/tune/train",
            name=trial_id,
            runs_dir=f"{output_dir}/runs/{trial_id}",
            callbacks=[ReportUntilLast(eval_steps, settings.search.unmeasured)],
        )
    except (WorkerGroupError, DoesNotFitError) as error:
        failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else [error]
        memory_error = next((failure for failure in failures if out_of_memory(failure)), None)
        if memory_error is None:
            raise
        refused = isinstance(memory_error, DoesNotFitError)  # before it took the memory
        shortage = memory_shortage(memory_error) or (str(memory_error) if refused else "")
        reason = {REASON: shortage} if shortage else {}
        tune.report({**settings.search.unmeasured, "infeasible": True, EVALUATION_NUMBER: 0, **reason})
    else:
        # Reported here and not by the callback: if Tune restarts a trial whose training had already finished,
        # this is its only report.
        metrics = (
            settings.search.unmeasured
            | outcome.metrics
            | {
                EVALUATION_NUMBER: evaluation_number(outcome.metrics, eval_steps),
                CHECKPOINT_PATH_KEY: outcome.checkpoint,
                LAST_CHECKPOINT: outcome.last_checkpoint,
            }
        )
        tune.report(metrics)


class ReportUntilLast(TuneReportCallback):
    """Numbers the reports of a run and passes them to Tune, except its final one.

    Args:
        unmeasured: a placeholder for each objective, for reports in which it is missing.
    """

    def __init__(self, eval_steps: float | None, unmeasured: Mapping[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eval_steps, self.unmeasured = eval_steps, unmeasured

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        first_worker = metrics[0]
        if not ran_to_its_end(first_worker):
            numbered = {
                **self.unmeasured,
                **first_worker,
                EVALUATION_NUMBER: evaluation_number(first_worker, self.eval_steps),
            }
            super().after_report(run_context, [numbered], checkpoint)


def out_of_memory(error: Exception) -> bool:
    """Whether a worker ran out of GPU or machine memory, or refused to start because it would."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or is_out_of_memory(error)
