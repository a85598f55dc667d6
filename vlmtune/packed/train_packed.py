"""One adapter trained by an engine with one slot, or by several: `train.py --trial_runner packed`, and a
packed trial repeated alone."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DivergedError, DoesNotFitError, UserError
from vlmtune.packed.build import check_packable
from vlmtune.packed.checkpoint_folder import last_checkpoint, last_report
from vlmtune.packed.engine import NO_ROW_FITS, Engine
from vlmtune.packed.engine_actor import start_engines
from vlmtune.packed.messages import NOTES, TrialReport, UnknownTrialError
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.training.gauges import Gauges
from vlmtune.training.launch import Outcome, Progress, fit, worker_resources
from vlmtune.training.run import watched

NAME = "train"
WAIT = 20.0  # seconds that one call waits in the engine


def run_packed(settings: Settings, store: Store, folder: str, cluster: Cluster, show: Progress) -> Outcome:
    """Train the settings in an engine of their own: in this process with `--num_workers 0`, else on GPUs or
    CPUs of the cluster.

    Raises:
        ConfigError: an option cannot be trained packed.
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
        DivergedError: the loss or gradient is no number any more.
    """
    check_packable(settings)
    workers = settings.run.workers
    if workers == 0:
        return _outcome(train(settings, store, folder, show))
    if workers == 1:
        return watched(lambda progress: _in_actor(settings, store, folder, cluster, progress), show)
    return watched(lambda progress: _on_ray(settings, store, folder, cluster, progress), show)


def train(
    settings: Settings, store: Store, folder: str, show: Progress, shard: WorkerShard = SINGLE_WORKER
) -> dict[str, Any]:
    """Train this process's share of the settings, from a checkpoint that is there; returns the last report,
    which only the first one has.

    `folder`: of the run; several workers need to reach the same one.
    """
    place = _place(folder)
    last = last_report(place)
    if last is not None and last["step"] >= last["max_steps"]:
        return last
    reports: list[TrialReport] = []
    engine = Engine(
        settings.to_flags(),
        store,
        trials=1,
        rank=settings.lora.r,
        deliver=lambda _, report: reports.append(report),
        note=_told(show),
        shard=shard,
    )
    runs = f"{folder}/runs" if shard.rank == 0 else None
    with last_checkpoint(place) as checkpoint:
        slot = engine.slot(NAME, settings.to_flags(), runs_dir=runs, checkpoint=checkpoint, progress=show)
    engine.join(slot, place)
    while engine.round():
        pass
    engine.close()
    if not reports:
        return {}
    _check_ended(reports[-1].metrics)
    return reports[-1].metrics


def _on_ray(settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress) -> Outcome:
    """In Ray Train workers that sum their gradients, one to a GPU or CPU."""
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "values": settings.to_flags(),
            "store": store,
            "folder": folder,
            "progress": progress,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.run.max_workers, use_gpu=gpu, resources_per_worker=worker_resources(gpu)
        ),
        run_config=RunConfig(storage_path=f"{folder}/checkpoints", name="workers"),
    )
    fit(trainer)
    last = last_report(_place(folder))
    if last is None:
        raise RuntimeError(f"the run in {folder} ended without a report")
    return _outcome(last)


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    show = Gauges(NAME, rank, config["progress"] if rank == 0 else None)
    train(
        Settings.from_flags(config["values"]),
        config["store"],
        config["folder"],
        show,
        WorkerShard(rank, context.get_world_size()),
    )


def _in_actor(settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress) -> Outcome:
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    (engine,), notes = start_engines(
        settings.to_flags(), store, count=1, trials=1, rank=settings.lora.r, gpu=gpu
    )
    for note in notes:
        _told(progress)(note)
    place, number = _place(folder), 0
    joined = False
    while True:
        try:
            if not joined:
                call: Any = engine.join.remote(NAME, settings.to_flags(), place, f"{folder}/runs", progress)
                joined, number = ray.get(call), 0
            report: Any = ray.get(engine.wait.remote(NAME, number, WAIT))  # as `EngineActor.wait`
        except ActorUnavailableError:
            joined = False
            continue
        except RayTaskError as error:
            if isinstance(error.cause, UnknownTrialError):
                joined = False
                continue
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        if report is not None:
            number += 1
            for note in report[0].get(NOTES, ()):
                _told(progress)(note)
            if report[1]:
                return _outcome(report[0])


def _check_ended(metrics: dict[str, Any]) -> None:
    """Raises a UserError where this last report is not that of a run which came to its end."""
    if metrics.get("infeasible"):
        raise DoesNotFitError(NO_ROW_FITS)
    if "checkpoint_path" not in metrics:
        raise DivergedError(
            f"the loss or its gradient is no number any more at step {metrics['step']} of {metrics['max_steps']}: "
            "give a smaller --learning_rate"
        )


def _outcome(metrics: dict[str, Any]) -> Outcome:
    _check_ended(metrics)
    kept = {
        name: value for name, value in metrics.items() if name not in ("checkpoint_path", "evaluation", NOTES)
    }
    return Outcome(kept, metrics["checkpoint_path"])


def _place(folder: str) -> str:
    return f"{folder}/checkpoints/{NAME}"


def _told(show: Progress) -> Any:
    return lambda text: show({"note": text})
