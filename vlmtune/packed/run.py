"""One adapter trained by an engine with one slot: what `train.py --trial_runner packed` does, and how a packed trial is repeated alone."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayTaskError

from vlmtune.cluster import Cluster
from vlmtune.config import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, UserError
from vlmtune.packed.actor import start_engines
from vlmtune.packed.checkpoints import last_checkpoint
from vlmtune.packed.engine import Engine, Report
from vlmtune.packed.setup import not_packable
from vlmtune.training.launch import Outcome, Progress
from vlmtune.training.run import watched

NAME = "train"
WAIT = 20.0  # seconds that one call waits in the engine


def run_packed(settings: Settings, store: Store, folder: str, cluster: Cluster, show: Progress) -> Outcome:
    """Train the settings in an engine of their own: in this process with `--num_workers 0`, else on a GPU or CPU of the cluster.

    Raises:
        ConfigError: an option cannot be trained packed.
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
    """
    if (reason := not_packable(settings)) is not None:
        raise ConfigError(f"--trial_runner packed: cannot train {reason}; use --trial_runner isolated")
    if settings.data.workers == 0:
        return _in_process(settings, store, folder, show)
    return watched(lambda progress: _in_actor(settings, store, folder, cluster, progress), show)


def _in_process(settings: Settings, store: Store, folder: str, show: Progress) -> Outcome:
    reports: list[Report] = []
    engine = Engine(
        settings.to_dict(), store, trials=1, rank=settings.model.lora_r, deliver=lambda _, report: reports.append(report), note=_told(show)
    )
    place = f"{folder}/checkpoints/{NAME}"
    with last_checkpoint(place) as checkpoint:
        slot = engine.slot(NAME, settings.to_dict(), runs_dir=f"{folder}/runs", checkpoint=checkpoint, progress=show)
    engine.join(slot, place)
    while engine.round():
        pass
    engine.close()
    return _outcome(reports[-1].metrics)


def _in_actor(settings: Settings, store: Store, folder: str, cluster: Cluster, progress: Progress) -> Outcome:
    gpu = cluster.workers_use_gpu(settings.get("use_cpu"))
    (engine,), notes = start_engines(settings.to_dict(), store, count=1, trials=1, rank=settings.model.lora_r, gpu=gpu)
    for note in notes:
        _told(progress)(note)
    place, number = f"{folder}/checkpoints/{NAME}", 0
    joined = False
    while True:
        try:
            if not joined:
                ray.get(engine.join.remote(NAME, settings.to_dict(), place, f"{folder}/runs", progress))
                joined, number = True, 0
            report: tuple[dict[str, Any], bool] | None = ray.get(engine.wait.remote(NAME, number, WAIT))
        except ActorUnavailableError:
            joined = False
            continue
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        if report is not None:
            number += 1
            if report[1]:
                return _outcome(report[0])


def _outcome(metrics: dict[str, Any]) -> Outcome:
    kept = {name: value for name, value in metrics.items() if name not in ("checkpoint_path", "evaluation")}
    return Outcome(kept, metrics["checkpoint_path"])


def _told(show: Progress) -> Any:
    return lambda text: show({"note": text})
