"""Run the training loop of one adapter in this process, or in Ray Train workers, with the same result."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow.fs as pafs
import ray.train
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from vlmtune.checksums import damaged_file, write_checksums
from vlmtune.cluster import WORKER_CPUS
from vlmtune.compat.ray_train import is_worker_loss
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches, stream_batches
from vlmtune.errors import UserError
from vlmtune.storage import filesystem
from vlmtune.training.best_evaluation import BEST_STEP, LAST, EvaluationRule
from vlmtune.training.gauges import Gauges

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    Attributes:
        metrics: the last report.
        checkpoint: folder or URI of the checkpoint of the evaluation that counts, see `best_evaluation`.
        last_checkpoint: folder or URI of the checkpoint after the last step.
    """

    metrics: dict[str, Any]
    checkpoint: str
    last_checkpoint: str | None = None


# How often a run resumes from its last checkpoint after a worker died. It counts machines that go without
# notice
# and workers that the system kills. If a cloud announces that it takes a spot machine back, Ray restarts the
# run
# itself, without limit.
MAX_RESTARTS = 8
KEPT_CHECKPOINTS = 2  # checkpoints of a run: if the last one is damaged, the one before it is used
METRICS_FILE = "report.json"  # in a checkpoint of `run_in_process`: the metrics of its report; written last


def run_in_process(
    settings: Settings, store: Store, output_dir: str, *, progress: Progress | None = None
) -> Outcome:
    """Train in this process, without Ray Train.

    The last two checkpoints stay in `output_dir`/checkpoints. A run resumes from the last undamaged one.
    """
    from vlmtune.training.loop import train
    from vlmtune.training.step_plan import length_multiple

    def report(metrics: dict[str, Any], folder: str) -> None:
        text = json.dumps(metrics)
        write_checksums(Path(folder), report_json=text)
        (Path(folder) / METRICS_FILE).write_text(text)
        by_step = sorted(work_dir.glob("checkpoint-*"), key=_step)
        to_keep = {*by_step[-KEPT_CHECKPOINTS:], work_dir / f"checkpoint-{metrics.get(BEST_STEP)}"}
        for checkpoint in by_step:
            if checkpoint not in to_keep:
                shutil.rmtree(checkpoint)

    work_dir = Path(output_dir) / "checkpoints"
    train(
        settings,
        store,
        read_batches=partial(read_batches, store, pad_to_multiple_of=length_multiple(settings)),
        report=report,
        work_dir=str(work_dir),
        runs_dir=f"{output_dir}/runs",
        checkpoint=last_checkpoint(work_dir),
        progress=progress,
    )
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is None:
        raise RuntimeError(f"the run in {output_dir} ended without a report")
    metrics = json.loads((Path(checkpoint) / METRICS_FILE).read_text())
    best = work_dir / f"checkpoint-{metrics[BEST_STEP]}" if BEST_STEP in metrics else checkpoint
    return Outcome(metrics, str(best), checkpoint)


def last_checkpoint(work_dir: Path) -> str | None:
    """The last undamaged checkpoint of `run_in_process`; None if there is none."""
    complete = [report.parent for report in work_dir.glob(f"checkpoint-*/{METRICS_FILE}")]
    local = pafs.LocalFileSystem()
    for folder in sorted(complete, key=_step, reverse=True):
        if find_damage(local, str(folder)) is None:
            return str(folder)
    return None


def find_damage(files: pafs.FileSystem, folder: str) -> str | None:
    """The name of a damaged file of a checkpoint, which is also logged; None if no file is damaged."""
    name = damaged_file(files, folder)
    if name is not None:
        logger.info(console_line("", f"{folder}/{name} is damaged: the checkpoint before it is used"))
    return name


def undamaged_checkpoint(latest: Checkpoint | None) -> Checkpoint | None:
    """Ray Train's latest checkpoint; if its files are damaged, the last undamaged one before it."""
    if latest is None or latest.filesystem is None:
        return None
    files, (parent, _, name) = latest.filesystem, latest.path.rpartition("/")
    folders = [
        entry.path
        for entry in files.get_file_info(pafs.FileSelector(parent))
        if entry.type == pafs.FileType.Directory
        and entry.base_name.startswith("checkpoint_")
        and entry.base_name <= name
    ]
    for folder in sorted(folders, reverse=True):
        if find_damage(files, folder) is None:
            return Checkpoint(folder, filesystem=files)
    return None


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def run_on_ray(
    settings: Settings,
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
    """Train in Ray Train workers, each on one GPU or CPU. Checkpoints go to `storage_path`/`name`.

    A run resumes from the last checkpoint in that folder, also after a worker died.

    Args:
        workers: the number of workers, or (min, max) for an elastic run.
        callbacks: Ray Train callbacks of the run.
        progress: called by the first worker with the numbers of each logged step; must pickle.

    Raises:
        UserError: a worker raised it.
        TrainingFailedError: a worker failed for another reason.
    """
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "settings": settings,
            "store": store,
            "name": name,
            "runs_dir": runs_dir,
            "progress": progress,
        },
        # Ray Train takes a range of workers for an elastic run; the public ScalingConfig's type says int.
        scaling_config=ScalingConfig(
            num_workers=cast(int, workers), use_gpu=use_gpu, resources_per_worker=worker_resources(use_gpu)
        ),
        run_config=RunConfig(
            storage_path=storage_path,
            name=name,
            callbacks=list(callbacks),
            checkpoint_config=kept_checkpoints(settings, store),
        ),
    )
    result = fit(trainer)
    if result.metrics is None or result.checkpoint is None:
        raise RuntimeError(f"the run {name} ended without a report")
    last, best = result.checkpoint.path, result.metrics.get(BEST_STEP)
    paths = {metrics["step"]: checkpoint.path for checkpoint, metrics in result.best_checkpoints or ()}
    return Outcome(result.metrics, last if best is None else paths.get(best, last), last)


def kept_checkpoints(settings: Settings, store: Store) -> CheckpointConfig:
    """Keep the last two checkpoints; with `load_best_model_at_end`, those of the two best evaluations."""
    rule = EvaluationRule.of(settings, len(store.rows_of(EVAL)))
    if not rule.load_best:
        return CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS)
    # Ray also keeps the last checkpoint. It compares `last_METRIC`, the number of each report's own
    # evaluation.
    order: Any = rule.mode
    return CheckpointConfig(
        num_to_keep=KEPT_CHECKPOINTS,
        checkpoint_score_attribute=f"{LAST}{rule.metric}",
        checkpoint_score_order=order,
    )


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Run the trainer; run it again if a worker died.

    Ray's own `max_failures` would also repeat a run in which a worker raised an exception.
    """
    for restarts_left in reversed(range(MAX_RESTARTS + 1)):
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
            for failure in failures:
                if isinstance(failure, UserError):
                    raise failure from None
            # If a worker dies, the others fail too, because they wait for it.
            if not restarts_left or not any(is_worker_loss(failure) for failure in failures):
                raise
    raise AssertionError


def worker_resources(use_gpu: bool) -> dict[str, float]:
    """The resources that one training worker reserves in Ray."""
    return {"CPU": WORKER_CPUS, "GPU": 1} if use_gpu else {"CPU": WORKER_CPUS}


def worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    from vlmtune.training.loop import train
    from vlmtune.training.step_plan import length_multiple

    context = ray.train.get_context()
    settings: Settings = config["settings"]
    store: Store = config["store"]
    rank = context.get_world_rank()

    def report(metrics: dict[str, Any], folder: str) -> None:
        if rank == 0:
            write_checksums(Path(folder))
        # Every worker reports its folder, with its random state; Ray Train merges them into one checkpoint.
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if rank == 0 and local_runs != runs_dir:
            target, inner = filesystem(runs_dir)
            target.create_dir(inner, recursive=True)
            pafs.copy_files(local_runs, inner, destination_filesystem=target)

    runs_dir: str = config["runs_dir"]
    checkpoint = undamaged_checkpoint(ray.train.get_checkpoint())
    with (
        tempfile.TemporaryDirectory() as work_dir,
        checkpoint.as_directory() if checkpoint else nullcontext() as start,
    ):
        # TensorBoard appends to event files, which no object store allows.
        local_runs = f"{work_dir}/runs" if "://" in runs_dir else runs_dir
        train(
            settings,
            store,
            read_batches=partial(stream_batches, store, pad_to_multiple_of=length_multiple(settings)),
            report=report,
            work_dir=work_dir,
            runs_dir=local_runs,
            tracked_dir=runs_dir,
            rank=rank,
            world_size=context.get_world_size(),
            checkpoint=str(Path(start)) if start else None,
            progress=Gauges(config["name"], rank, config["progress"] if rank == 0 else None),
        )
