"""Train a single run in an engine, for `train.py --trial_runner packed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.train
from ray.exceptions import RayTaskError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DivergedError, DoesNotFitError, UserError
from vlmtune.packed.checkpoint_folder import fetch_last_checkpoint, read_last_report
from vlmtune.packed.engine import DOES_NOT_FIT, Engine
from vlmtune.packed.engine_client import EngineClient
from vlmtune.packed.engine_pool import start_engines, wait_for_trackers
from vlmtune.packed.messages import BEST_CHECKPOINT, NOTES, TrialReport, TrialRequest
from vlmtune.packed.packable import check_packable
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.trackers.tracker import finish_trackers
from vlmtune.training.best_evaluation import LAST_CHECKPOINT, ran_to_its_end
from vlmtune.training.gauges import Gauges
from vlmtune.training.isolated import run_with_progress
from vlmtune.training.launch import Outcome, Progress, fit, worker_resources
from vlmtune.training.meter import EVALUATION_NUMBER

RUN_ID = "train"  # the id of the engine's only trial


def run_packed(settings: Settings, store: Store, folder: str, cluster: Cluster, show: Progress) -> Outcome:
    """Train one run with these settings in an engine of its own.

    With `--num_workers 0` the engine is in this process, with 1 in an actor, with more in Ray Train workers.

    Args:
        folder: the output folder of the run.
        show: called with the numbers of each logged step and evaluation, and with {"note": text}.

    Raises:
        ConfigError: an option cannot be trained packed.
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
        DivergedError: the loss or gradient became NaN or infinite.
    """
    check_packable(settings)
    workers = settings.run.workers
    if workers == 0:
        return _outcome(train_shard(settings, store, folder, show))
    train = _train_in_actor if workers == 1 else _train_in_workers
    return run_with_progress(lambda progress: train(settings, store, folder, cluster, progress), show)


def train_shard(
    settings: Settings, store: Store, folder: str, progress: Progress, shard: WorkerShard = SINGLE_WORKER
) -> dict[str, Any]:
    """Train this process's part of the run, from its last checkpoint if there is one.

    Args:
        folder: the output folder of the run, which all workers need to reach.

    Returns:
        The metrics of the final report; an empty dict on all workers but the first.
    """
    checkpoints = _checkpoint_folder(folder)
    last = read_last_report(checkpoints, _note(progress))
    if last is not None and ran_to_its_end(last):
        return last
    reports: list[TrialReport] = []
    engine = Engine(
        settings,
        store,
        trials=1,
        max_lora_rank=settings.lora.r,
        deliver=lambda _, report: reports.append(report),
        note=_note(progress),
        shard=shard,
    )
    with fetch_last_checkpoint(checkpoints) as checkpoint:
        slot = engine.slot_factory.make(
            RUN_ID,
            settings,
            folder=checkpoints,
            runs_dir=f"{folder}/runs" if shard.rank == 0 else None,
            checkpoint=checkpoint,
            on_log=progress,
        )
    engine.join(slot)
    while engine.train_round():
        pass
    engine.close()
    finish_trackers()
    if not reports:
        return {}
    _check_completed(reports[-1].metrics)
    return reports[-1].metrics


def _train_in_workers(
    settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress
) -> Outcome:
    """Train in Ray Train workers that sum their gradients, one on each GPU or CPU."""
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"settings": settings, "store": store, "folder": folder, "progress": progress},
        scaling_config=ScalingConfig(
            num_workers=settings.run.max_workers, use_gpu=gpu, resources_per_worker=worker_resources(gpu)
        ),
        run_config=RunConfig(storage_path=f"{folder}/checkpoints", name="workers"),
    )
    fit(trainer)
    last = read_last_report(_checkpoint_folder(folder))
    if last is None:
        raise RuntimeError(f"the run in {folder} ended without a report")
    return _outcome(last)


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    context = ray.train.get_context()
    shard = WorkerShard(context.get_world_rank(), context.get_world_size())
    progress = Gauges(RUN_ID, shard.rank, config["progress"] if shard.rank == 0 else None)
    train_shard(config["settings"], config["store"], config["folder"], progress, shard)


def _train_in_actor(
    settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress
) -> Outcome:
    """Train in an engine's actor, which Ray restarts if it dies."""
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    engines, notes = start_engines(settings, store, count=1, trials=1, max_lora_rank=settings.lora.r, gpu=gpu)
    request = TrialRequest(RUN_ID, settings, _checkpoint_folder(folder), f"{folder}/runs", progress)
    client = EngineClient(engines, RUN_ID, lambda engine: engine.join.remote(request))
    note = _note(progress)
    report = None
    while report is None or not report.final:
        for line in notes:
            note(line)
        try:
            report = client.read_report()
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        notes = report.metrics.get(NOTES, [])
    for line in notes:
        note(line)
    wait_for_trackers(engines)
    return _outcome(report.metrics)


def _check_completed(metrics: dict[str, Any]) -> None:
    """Raises a UserError if the run ended before it made all its steps."""
    if metrics.get("infeasible"):
        raise DoesNotFitError(DOES_NOT_FIT)
    if BEST_CHECKPOINT not in metrics:
        step = f"step {metrics['step']} of {metrics['max_steps']}"
        raise DivergedError(
            f"the loss or gradient became NaN or infinite at {step}: give a smaller --learning_rate"
        )


def _outcome(metrics: dict[str, Any]) -> Outcome:
    _check_completed(metrics)
    internal = (BEST_CHECKPOINT, LAST_CHECKPOINT, EVALUATION_NUMBER, NOTES)
    numbers = {name: value for name, value in metrics.items() if name not in internal}
    return Outcome(numbers, metrics[BEST_CHECKPOINT], metrics.get(LAST_CHECKPOINT))


def _checkpoint_folder(folder: str) -> str:
    return f"{folder}/checkpoints/{RUN_ID}"


def _note(progress: Progress) -> Callable[[str], None]:
    return lambda line: progress({"note": line})
