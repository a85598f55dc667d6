"""One trial, in the process that Tune starts for it: a Ray Train run whose reports are passed on. Its few
imports keep that start short."""

import math
from collections.abc import Mapping
from typing import Any

import ray.exceptions
from ray import tune
from ray.train import Checkpoint, WorkerGroupError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback

from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.model.memory import is_out_of_memory
from vlmtune.training.launch import run_on_ray
from vlmtune.training.meter import EVALUATION, evaluation_number

POINT = "point"  # the key of a grid point in a trial's Tune config


def point(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values by option name, out of its Tune config."""
    return dict(config.get(POINT, config))


def run_trial(
    config: dict[str, Any],
    *,
    values: dict[str, Any],
    store: Store,
    output_dir: str,
    workers: int | tuple[int, int],
    use_gpu: bool,
    metric: str,
    eval_steps: float | None,
) -> None:
    """Train with `values` and, before them, the trial's own, and report to Tune. A trial that does not fit
    in memory reports just that.

    Args:
        values: `Settings.to_dict()`.
        eval_steps: as the option; None where every epoch is evaluated.
    """
    trial_id = tune.get_context().get_trial_id()
    try:
        outcome = run_on_ray(
            values | point(config),
            store,
            workers=workers,
            use_gpu=use_gpu,
            storage_path=f"{output_dir}/tune/train",
            name=trial_id,
            runs_dir=f"{output_dir}/runs/{trial_id}",
            callbacks=[ReportUntilLast(eval_steps)],
        )
    except (WorkerGroupError, DoesNotFitError) as error:
        failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else [error]
        if not any(out_of_memory(failure) for failure in failures):
            raise
        tune.report({metric: math.nan, "infeasible": True, EVALUATION: 0})
    else:
        # Said here and not by the callback: a trial that is run again after its training had ended has no
        # other report.
        metrics = outcome.metrics | {
            EVALUATION: evaluation_number(outcome.metrics, eval_steps),
            CHECKPOINT_PATH_KEY: outcome.checkpoint,
        }
        tune.report(metrics)


class ReportUntilLast(TuneReportCallback):
    """Passes a run's reports on to Tune, numbered, but for that of its last step."""

    def __init__(self, eval_steps: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eval_steps = eval_steps

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        first = metrics[0]
        if first["step"] < first["max_steps"]:
            super().after_report(
                run_context, [{**first, EVALUATION: evaluation_number(first, self.eval_steps)}], checkpoint
            )


def out_of_memory(error: Exception) -> bool:
    """Whether a worker ended for want of memory, of its GPU or its machine, or did not begin because it
    would."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or is_out_of_memory(error)
