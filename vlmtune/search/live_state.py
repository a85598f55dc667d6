"""The state of a running search as a file, for its page: OUTPUT_DIR/live.json."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmtune.search.saved_trials import SavedTrial
from vlmtune.search.trial_results import state_of
from vlmtune.storage import scheme

NAME = "live.json"
SECONDS_BETWEEN_WRITES = 1.0
MOST_OF_TIME = 0.02  # share of the driver's time that writing takes: with 1,000 trials a write takes 20 ms
MOST_POINTS = 200  # of a trial's curve


class LiveState:
    """Writes the trials with their values, states and curves, at most once a second and at trials' ends.

    Nothing is written to object storage, where each write would cost a request.

    Args:
        objectives: the mode of each objective, "min" or "max".
        total: number of trials of the whole search.
    """

    def __init__(self, output_dir: str, objectives: Mapping[str, str], total: int) -> None:
        self.path = None if scheme(output_dir) else Path(output_dir) / NAME
        self.objectives, self.total = dict(objectives), total
        self.written = 0.0  # when, in seconds
        self.write_seconds = 0.0  # that the last write took

    def write(self, trials: Iterable[SavedTrial], *, at_once: bool, running: bool = True) -> None:
        """Write the trials as they are now.

        Args:
            at_once: also if they were written a moment ago, unless writing would take more than its share of
                the time.
            running: whether the search is still running. Its end is always written.
        """
        now = time.time()
        least = 0.0 if at_once else SECONDS_BETWEEN_WRITES
        least = max(least, self.write_seconds / MOST_OF_TIME) if running else 0.0
        if self.path is None or now - self.written < least:
            return
        self.written = now
        ordered = sorted(trials, key=lambda trial: trial.number)
        state = {
            "objectives": self.objectives,
            "total": self.total,
            "running": running,
            "written": now,
            "trials": [self._trial(trial) for trial in ordered],
        }
        unfinished = self.path.with_suffix(".part")
        try:
            unfinished.write_text(json.dumps(state, ensure_ascii=False, default=str), encoding="utf-8")
            unfinished.rename(self.path)
            self.write_seconds = time.time() - now
        except OSError:  # a full disk shows at the trials' own files, which matter
            self.path = None

    def _trial(self, trial: SavedTrial) -> dict[str, Any]:
        metric = next(iter(self.objectives))
        numbers = {
            name: value
            for name in ("step", "max_steps", "seconds", "train_loss", *self.objectives)
            if isinstance(value := trial.last_report.get(name), int | float) and math.isfinite(value)
        }
        curve = [
            (report["step"], report[metric])
            for report in trial.reports[-MOST_POINTS:]
            if "step" in report and math.isfinite(report.get(metric, math.nan))
        ]
        return {
            "number": trial.number + 1,
            "trial_id": trial.trial_id,
            "state": "RUNNING" if trial.end is None else state_of(trial),
            "values": trial.values,
            **numbers,
            "curve": curve,
        }
