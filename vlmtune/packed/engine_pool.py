"""Start the engines of a search or a run, one on each GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from vlmtune.console import console_line
from vlmtune.errors import UserError
from vlmtune.packed.engine_actor import EngineActor
from vlmtune.trackers.tracker import SECONDS_TO_FINISH

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings
    from vlmtune.data.store import Store

logger = logging.getLogger(__name__)

MAX_RESTARTS = 8  # of one engine, after its process died
# Least time in seconds that the other engines get to start after the first one. Then the search begins
# without those that have not started, because something else may use their GPU.
ENGINE_START_GRACE_S = 30.0
# Of an engine's actor. Each trial waits in one call; trials without a slot wait in one or two calls at each
# engine.
MAX_CONCURRENT_CALLS = 256
ENGINE_CPUS = 0.9  # CPUs that Ray reserves for an engine, also with a GPU: its thread keeps a core busy


def start_engines(
    settings: Settings,
    store: Store,
    *,
    count: int,
    trials: int,
    max_lora_rank: int,
    gpu: bool,
    most_demanding: Settings | None = None,
) -> tuple[list[ActorHandle[Any]], list[str]]:
    """Start engines, each on its own GPU or on CPUs. They end with this process.

    An engine that cannot start yet takes trials as soon as its GPU is free.

    Args:
        count: number of engines.
        trials, max_lora_rank, most_demanding: arguments of each `Engine`.

    Returns:
        The engines, and the console lines that they have noted.

    Raises:
        DoesNotFitError: the base does not fit in a GPU's memory.
    """
    remote: Any = ray.remote(EngineActor)
    options = {
        "num_cpus": ENGINE_CPUS,
        "num_gpus": 1 if gpu else 0,
        "max_concurrency": MAX_CONCURRENT_CALLS,
        "max_restarts": MAX_RESTARTS,
    }
    engines = [
        remote.options(**options).remote(settings, store, trials, max_lora_rank, most_demanding)
        for _ in range(count)
    ]
    device = "GPU" if gpu else "CPU"
    starts = [engine.start.remote() for engine in engines]
    ready, waiting = _wait_for_starts(starts, device)
    lines = [
        _take_notes(engine, start) for engine, start in zip(engines, starts, strict=True) if start in ready
    ]
    notes = list(dict.fromkeys(line for part in lines for line in part))
    if waiting:
        free = f"{len(ready)} of {count} {device}s are free"
        notes.append(console_line("", f"{free}; trials use the others once they are free"))
    return engines, notes


def _take_notes(engine: ActorHandle[Any], start: Any) -> list[str]:
    """The console lines of an engine whose start has ended.

    Raises:
        DoesNotFitError: the base does not fit in a GPU's memory.
    """
    try:
        ray.get(start)
        notes: list[str] = ray.get(engine.take_notes.remote())
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayActorError:
        return [console_line("", "an engine's process died while it started; trials start it again")]
    return notes


def _wait_for_starts(starts: list[Any], device: str) -> tuple[list[Any], list[Any]]:
    """Wait for the first start, then some time for the others; returns (done starts, pending starts)."""
    began = time.monotonic()
    if not ray.wait(starts, timeout=ENGINE_START_GRACE_S)[0]:
        logger.info(console_line("Waiting", f"for a free {device}, and for its engine to load the base"))
        ray.wait(starts)
    grace = max(ENGINE_START_GRACE_S, time.monotonic() - began)
    return ray.wait(starts, num_returns=len(starts), timeout=grace)


def wait_for_trackers(engines: Sequence[ActorHandle[EngineActor]]) -> None:
    """Wait until the engines have ended their runs in the services of `report_to`, before they are killed."""
    finished: list[Any] = [engine.finish_trackers.remote() for engine in engines]
    ray.wait(finished, num_returns=len(finished), timeout=SECONDS_TO_FINISH)  # a dead engine is ready at once
