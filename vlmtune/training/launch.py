"""One run: the training loop in this process, or in Ray Train workers, with the same result."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray.train
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from vlmtune.cluster import WORKER_CPUS
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches, stream_batches

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Outcome:
    """The last report of a run and the checkpoint that came with it (folder or URI)."""

    metrics: dict[str, Any]
    checkpoint: str


def run_in_process(values: dict[str, Any], store: Store, output_dir: str, *, progress: Progress | None = None) -> Outcome:
    """Train here, without Ray Train; checkpoints stay in `output_dir`/checkpoints."""
    from vlmtune.training.loop import train

    reports: list[tuple[dict[str, Any], str]] = []

    def report(metrics: dict[str, Any], folder: str) -> None:
        for _, earlier in reports:
            shutil.rmtree(earlier, ignore_errors=True)
        reports.append((metrics, folder))

    work_dir = f"{output_dir}/checkpoints"
    train(
        values, store, rows=partial(read_batches, store), report=report, work_dir=work_dir, runs_dir=f"{output_dir}/runs", progress=progress
    )
    metrics, folder = reports[-1]
    return Outcome(metrics, folder)


def run_on_ray(
    values: dict[str, Any],
    store: Store,
    *,
    workers: int | tuple[int, int],
    use_gpu: bool,
    storage_path: str,
    name: str,
    runs_dir: str,
    callbacks: Sequence[Any] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Train in Ray Train workers, one to a GPU or CPU; checkpoints go to `storage_path`/`name`.

    Args:
        workers: how many, or (fewest, most) for an elastic run.
        callbacks: Ray Train callbacks of the run.
        progress: called by the first worker with each logged step; must pickle.
    """
    trainer = TorchTrainer(
        worker,
        train_loop_config={"values": values, "store": store, "runs_dir": runs_dir, "progress": progress},
        # Ray Train's own ScalingConfig takes a range for an elastic run, the type that it is exported under does not say so.
        scaling_config=ScalingConfig(num_workers=cast(int, workers), use_gpu=use_gpu, resources_per_worker=worker_resources(use_gpu)),
        run_config=RunConfig(
            storage_path=storage_path,
            name=name,
            callbacks=list(callbacks),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    result = trainer.fit()
    if result.metrics is None or result.checkpoint is None:
        raise RuntimeError(f"the run {name} ended without a report")
    return Outcome(result.metrics, result.checkpoint.path)


def worker_resources(use_gpu: bool) -> dict[str, float]:
    """What one training worker asks Ray for."""
    return {"CPU": WORKER_CPUS, "GPU": 1} if use_gpu else {"CPU": WORKER_CPUS}


def worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    from vlmtune.training.loop import train

    context = ray.train.get_context()
    store: Store = config["store"]
    rank = context.get_world_rank()

    def report(metrics: dict[str, Any], folder: str) -> None:
        # Every rank gives its folder: the others hold their random state, and Ray Train merges them into one checkpoint.
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
        shutil.rmtree(folder, ignore_errors=True)

    checkpoint = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as work_dir, checkpoint.as_directory() if checkpoint else nullcontext() as start:
        train(
            config["values"],
            store,
            rows=partial(stream_batches, store),
            report=report,
            work_dir=work_dir,
            runs_dir=config["runs_dir"],
            rank=rank,
            world=context.get_world_size(),
            checkpoint=str(Path(start)) if start else None,
            progress=config["progress"] if rank == 0 else None,
        )
