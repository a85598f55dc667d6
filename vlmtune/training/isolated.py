"""Run one isolated training: TRL's SFTTrainer in this process or in Ray Train workers."""

from collections.abc import Callable

from ray.util.queue import Empty, Queue

from vlmtune.background import in_background
from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.training.launch import Outcome, Progress, run_in_process, run_on_ray


def run_isolated(
    settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress
) -> Outcome:
    """Train in this process with `--num_workers 0`, otherwise in Ray Train workers.

    Args:
        folder: the output folder, for checkpoints and curves. A run resumes from a checkpoint in it.
        progress: called in this process with the numbers of each logged step.
    """
    if settings.run.workers == 0:
        return run_in_process(settings, store, folder, progress=progress)

    def run(report: Progress) -> Outcome:
        return run_on_ray(
            settings,
            store,
            workers=settings.run.workers,
            use_gpu=cluster.workers_use_gpu(settings.run.use_cpu),
            storage_path=f"{folder}/checkpoints",
            name="train",
            runs_dir=f"{folder}/runs",
            progress=report,
        )

    return run_with_progress(run, progress)


def run_with_progress(run: Callable[[Progress], Outcome], progress: Progress) -> Outcome:
    """Call `run` in a thread, and call `progress` with each of its reports.

    Args:
        run: called with a function that takes reports, and that may be called in other processes.
        progress: called in this process.
    """
    reports = Queue(actor_options={"num_cpus": 0})
    outcome = in_background(lambda: run(reports.put), "run")
    while not (outcome.done() and reports.empty()):
        try:
            progress(reports.get(timeout=0.5))
        except Empty:
            continue
    reports.shutdown()
    return outcome.result()
