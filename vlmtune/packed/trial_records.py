"""`TrialRecords`: the measured speed of a packed trial, and its TensorBoard events."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs

from vlmtune.config.settings import Settings
from vlmtune.storage import filesystem
from vlmtune.trackers.tracker import open_trackers
from vlmtune.training.meter import Meter


class TrialRecords:
    """Measures the speed of one trial, whose seconds are its part of the engine's time, and logs it.

    Args:
        runs_dir: folder or URI of the trial's TensorBoard events; None for no events and no tracker.
        on_log: called with the numbers of each logged step.
        flops_per_token: floating-point operations of training on one token.

    Attributes:
        seconds: the trial's part of the device's time.
    """

    def __init__(
        self,
        settings: Settings,
        runs_dir: str | None,
        on_log: Callable[[dict[str, Any]], None] | None,
        flops_per_token: float,
    ) -> None:
        self.runs_dir = runs_dir
        # TensorBoard appends to event files, which object stores do not allow. So they are written locally
        # first.
        remote = runs_dir is not None and "://" in runs_dir
        self.local_runs = tempfile.mkdtemp(prefix="runs-") if remote else runs_dir
        self.seconds = 0.0
        trackers = [] if runs_dir is None else open_trackers(settings, runs_dir)
        self.meter = Meter(self.local_runs, on_log, lambda: self.seconds, trackers)
        self.meter.flops_per_token = flops_per_token

    def add_seconds(self, seconds: float, data_wait_s: float) -> None:
        """Add the trial's part of a round's time, and of the time in which the round waited for rows."""
        self.seconds += seconds
        self.meter.data_wait_s += data_wait_s

    def publish_runs(self) -> None:
        """Copy the TensorBoard events to `runs_dir` if that is a URI."""
        if self.runs_dir is not None and self.local_runs != self.runs_dir:
            target, path = filesystem(self.runs_dir)
            target.create_dir(path, recursive=True)
            pafs.copy_files(self.local_runs, path, destination_filesystem=target)
