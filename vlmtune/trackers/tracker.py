"""Sends a run's numbers to the services of `report_to`, in a thread: training never waits for a network."""

import posixpath
import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.library_errors import LIBRARY_ERRORS, first_line
from vlmtune.shown_text import redacted_values
from vlmtune.storage import scheme
from vlmtune.trackers.services import FOLDER, SERVICES, TrackedRun

SECONDS_TO_FINISH = 30.0  # that `finish_trackers` waits for what has not been sent
REFIT = "tune/refit"  # folder of a search's last training, below its output folder


class Tracker:
    """A run in one service. What the service refuses is told once, and the run continues without it.

    Args:
        name: of the service.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name, self.run = name, run
        self._numbers: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._trouble: str | None = None
        _OPEN.add(self)
        self._thread = threading.Thread(target=self._send, name=f"{name} {run.name}", daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers by the name of their curve; returns at once."""
        self._numbers.put((dict(numbers), step))

    def close(self) -> None:
        """End the run, after all of its numbers; returns at once. `finish_trackers` waits for it."""
        self._numbers.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the closed run has ended, at most so long."""
        self._thread.join(seconds)

    def take_trouble(self) -> str | None:
        """Why the service has nothing more of this run; None while it has, and after the first call."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def _send(self) -> None:
        kinds: tuple[type[Exception], ...] = (*LIBRARY_ERRORS, *_own_errors(self.name))
        try:
            service = SERVICES[self.name](self.run)
            while (item := self._numbers.get()) is not None:
                service.log(*item)
            service.finish()
        except kinds as error:
            self._trouble = f"{self.name}: {first_line(error)}; the run continues without it"
        finally:
            _OPEN.discard(self)


_OPEN: set[Tracker] = set()  # the runs of this process that have not ended


def finish_trackers() -> None:
    """End all runs of this process, before it ends: what has not been sent by then is lost."""
    deadline = time.monotonic() + SECONDS_TO_FINISH
    for tracker in list(_OPEN):
        tracker.close()
    for tracker in list(_OPEN):
        tracker.wait(max(0.0, deadline - time.monotonic()))


def _own_errors(service: str) -> tuple[type[Exception], ...]:
    """The errors of a service's package that are of no kind of Python's own."""
    if service == "wandb":
        import wandb

        return (wandb.Error,)
    if service == "mlflow":
        from mlflow.exceptions import MlflowException

        return (MlflowException,)
    return ()


def open_trackers(settings: Settings, runs_dir: str) -> list[Tracker]:
    """A tracker for each service of `report_to`.

    Args:
        runs_dir: folder or URI of the run's curves: OUTPUT/runs/TRIAL_ID of a trial, OUTPUT/runs else.
    """
    names = [name for name in settings.training.report_to or () if name in SERVICES]
    if not names:
        return []
    run = tracked_run(settings, runs_dir)
    return [Tracker(name, run) for name in names]


def tracked_run(settings: Settings, runs_dir: str) -> TrackedRun:
    """What a tracker shows of a run. See `open_trackers`."""
    folder, name = posixpath.split(runs_dir)
    if name != "runs":
        output_dir, name = posixpath.dirname(folder), name
        group = posixpath.basename(output_dir)
    elif folder.endswith(f"/{REFIT}"):
        output_dir, name = folder.removesuffix(f"/{REFIT}"), "refit"
        group = posixpath.basename(output_dir)
    else:
        output_dir, name, group = folder, posixpath.basename(folder), None
    local = tempfile.mkdtemp(prefix="trackers-") if scheme(output_dir) else f"{output_dir}/{FOLDER}"
    Path(local).mkdir(parents=True, exist_ok=True)
    return TrackedRun(output_dir, group, name, local, shown_values(settings, group is not None))


def shown_values(settings: Settings, is_trial: bool) -> dict[str, Any]:
    """The searched values of a trial, and whatever else differs from the defaults, by flag name."""
    values = settings.to_flags()
    space = values.pop("search_space", None) or {}
    searched = {name: settings.value(name) for name in space} if is_trial else {}
    return {name: shown(value) for name, value in {**values, **searched}.items()}


def shown(value: Any) -> Any:
    """A value as trackers take it: lists and mappings as text, without secrets in URIs."""
    value = redacted_values(value)
    return value if isinstance(value, str | int | float | bool) else str(value)
