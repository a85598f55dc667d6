"""`Tracker`: sends a run's numbers to a service in a thread, so that training never waits for the network."""

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

SECONDS_TO_FINISH = 30.0  # longest time that `finish_trackers` waits for numbers to be sent
REFIT = "tune/refit"  # folder of a search's refit, below its output folder


class Tracker:
    """A run in one service. If the service fails, that is reported once, and training continues without it.

    Args:
        name: the name of the service.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name, self.run = name, run
        self._numbers: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._trouble: str | None = None
        _OPEN.add(self)
        self._thread = threading.Thread(target=self._send, name=f"{name} {run.name}", daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers, by the names of their curves. Returns at once."""
        self._numbers.put((dict(numbers), step))

    def close(self) -> None:
        """End the run once all of its numbers are sent. Returns at once; `finish_trackers` waits."""
        self._numbers.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the closed run has ended, for at most `seconds`."""
        self._thread.join(seconds)

    def take_trouble(self) -> str | None:
        """Why the service has failed, at the first call after that; otherwise None."""
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


_OPEN: set[Tracker] = set()  # the trackers of this process that have not ended


def finish_trackers() -> None:
    """End all runs of this process, before the process ends. Numbers that were not sent by then are lost."""
    deadline = time.monotonic() + SECONDS_TO_FINISH
    for tracker in list(_OPEN):
        tracker.close()
    for tracker in list(_OPEN):
        tracker.wait(max(0.0, deadline - time.monotonic()))


def _own_errors(service: str) -> tuple[type[Exception], ...]:
    """The exceptions of a service's package that are not in LIBRARY_ERRORS."""
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
        runs_dir: folder or URI of the run's curves: OUTPUT/runs/TRIAL_ID for a trial, OUTPUT/runs for a run.
    """
    names = [name for name in settings.training.report_to or () if name in SERVICES]
    if not names:
        return []
    run = tracked_run(settings, runs_dir)
    return [Tracker(name, run) for name in names]


def tracked_run(settings: Settings, runs_dir: str) -> TrackedRun:
    """The description of a run for trackers. Arguments as in `open_trackers`."""
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
    """The searched values of a trial, and all settings that differ from the defaults, by flag name."""
    values = settings.to_flags()
    space = values.pop("search_space", None) or {}
    searched = {name: settings.value(name) for name in space} if is_trial else {}
    return {name: as_tracked(value) for name, value in {**values, **searched}.items()}


def as_tracked(value: Any) -> Any:
    """A value in a form that trackers accept: lists and mappings as text, URIs without secrets."""
    value = redacted_values(value)
    return value if isinstance(value, str | int | float | bool) else str(value)
