"""The services of `report_to`, behind one interface (`Service`).

Their packages are optional extras of vlmtune, and are imported only if a run uses them.
"""

import logging
import os
import posixpath
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vlmtune import storage

PROJECT = "vlmtune"  # project of W&B and Trackio, if the environment has no other
FOLDER = "trackers"  # in the output folder: ids of runs, and files that the services write on this machine
MLFLOW_FILE = "mlflow.db"  # in FOLDER, if the environment has no server
MAX_PARAMETER = 6000  # longest value of a parameter in MLflow, in characters


@dataclass(frozen=True)
class TrackedRun:
    """The description of one run for a service.

    Attributes:
        output_dir: absolute path or URI of the output folder, of the search or of the run.
        group: the name of the search; None for a run of `train.py`.
        name: the trial's id, or the output folder's name.
        local_dir: local folder for the files that a service writes.
        values: the run's settings, by flag name.
    """

    output_dir: str
    group: str | None
    name: str
    local_dir: str
    values: Mapping[str, Any]


class Service(Protocol):
    """A run in one service."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add numbers by the name of their curve."""

    def finish(self) -> None:
        """Tell that the run has ended."""


class WandbRun:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_MODE and its other environment variables are used.

    Raises:
        wandb.Error: the service refuses the run or cannot be reached.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # create_new, because the trials of an engine are several runs of one process.
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.group,
            name=run.name,
            id=saved_id(run, "wandb", lambda: uuid.uuid4().hex[:16]),
            resume="allow",
            reinit="create_new",
            dir=run.local_dir,
            config=dict(run.values),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        # A resumed run repeats steps, which W&B would drop if they were its own step counter.
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def finish(self) -> None:
        self.run.finish()


class MlflowRun:
    """A run of MLflow, in an experiment with the search's name. MLFLOW_TRACKING_URI is used.

    Raises:
        MlflowException: the service refuses the run or cannot be reached.
    """

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Param

        quiet_mlflow()
        self.client = mlflow_client(run.output_dir)
        tags = {"group": run.group} if run.group is not None else {}

        def create() -> str:
            experiment = mlflow_experiment(self.client, run.output_dir)
            return str(self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id)

        self.run_id = saved_id(run, "mlflow", create)
        values = [Param(name, str(value)[:MAX_PARAMETER]) for name, value in run.values.items()]
        self.client.log_batch(self.run_id, params=values)
        self.client.update_run(self.run_id, status="RUNNING")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self) -> None:
        self.client.set_terminated(self.run_id)


class TrackioRun:
    """A run of Trackio. TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID are used."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            group=run.group,
            name=run.name if run.group is None else f"{run.group}/{run.name}",
            config=dict(run.values),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self.run.finish()


SERVICES: dict[str, Callable[[TrackedRun], Service]] = {
    "wandb": WandbRun,
    "mlflow": MlflowRun,
    "trackio": TrackioRun,
}


def saved_id(run: TrackedRun, service: str, create: Callable[[], str]) -> str:
    """The id of a resumed run from the output folder, or a new id, which is written there."""
    path = storage.join(run.output_dir, f"{FOLDER}/{run.name}.{service}")
    if storage.exists(path):
        return storage.read_text(path).strip()
    new = create()
    storage.write_text(path, new)
    return new


def quiet_mlflow() -> None:
    """Keep MLflow's messages about its own tables out of the console."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def mlflow_client(output_dir: str) -> Any:
    """MLflow's client for MLFLOW_TRACKING_URI; by default for a file in the output folder."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir}/{FOLDER}/{MLFLOW_FILE}"
    )


def mlflow_experiment(client: Any, output_dir: str) -> str:
    """The id of the experiment called MLFLOW_EXPERIMENT_NAME; by default, as the output folder."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or posixpath.basename(output_dir)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process has created it
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
