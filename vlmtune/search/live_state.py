"""The state of a running search as a file, for its page: OUTPUT_DIR/live.json."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.search.saved_trials import SavedTrial
from vlmtune.search.trial_results import best_trial, state_of, trial_results
from vlmtune.storage import scheme
from vlmtune.training.best_evaluation import LIVE_ANSWERS

NAME = "live.json"
SECONDS_BETWEEN_WRITES = 1.0
MAX_SHARE_OF_TIME = 0.02  # of the driver's time, for writing: with 1,000 trials a write takes 20 ms
MAX_POINTS = 200  # of a trial's curve


class LiveState:
    """Writes the values, states and curves of all trials, at most once a second and when a trial ends.

    Nothing is written to object storage, where each write would cost a request.

    Args:
        objectives: the mode of each objective, "min" or "max".
        total: number of trials that the whole search runs.
    """

    def __init__(self, output_dir: str, objectives: Mapping[str, str], total: int) -> None:
        self.path = None if scheme(output_dir) else Path(output_dir) / NAME
        self.objectives, self.total = dict(objectives), total
        self.written_at = 0.0  # time.time() of the last write
        self.write_seconds = 0.0  # duration of the last write

    def write(self, trials: Iterable[SavedTrial], *, at_once: bool, running: bool = True) -> None:
        """Write the trials as they are now.

        Args:
            at_once: write even if the last write is a moment ago, as long as writing stays below
                MAX_SHARE_OF_TIME.
            running: whether the search is still running. Its end is always written.
        """
        now = time.time()
        min_seconds = 0.0 if at_once else SECONDS_BETWEEN_WRITES
        min_seconds = max(min_seconds, self.write_seconds / MAX_SHARE_OF_TIME) if running else 0.0
        if self.path is None or now - self.written_at < min_seconds:
            return
        self.written_at = now
        ordered = sorted(trials, key=lambda trial: trial.number)
        state = {
            "objectives": self.objectives,
            "total": self.total,
            "running": running,
            "written": now,
            "trials": [self._trial(trial) for trial in ordered],
            **self._answers(ordered),
        }
        unfinished = self.path.with_suffix(".part")
        try:
            unfinished.write_text(json.dumps(state, ensure_ascii=False, default=str), encoding="utf-8")
            unfinished.rename(self.path)
            self.write_seconds = time.time() - now
        except (
            OSError
        ):  # on a full disk, the trials' own files cannot be written either, and that is reported
            self.path = None

    def _answers(self, trials: Sequence[SavedTrial]) -> dict[str, Any]:
        """The fixed rows, and their latest answers by the best trial and those that run.

        `answers` has, by the number of a trial, (step, [answer to each row]) of its latest checkpoints.
        """
        metric, mode = next(iter(self.objectives.items()))
        best = best_trial(trial_results([one for one in trials if one.end is not None]), metric, mode)
        shown = [one for one in trials if one.end is None or (best and one.trial_id == best.trial_id)]
        found = {trial.number + 1: answered_reports(trial) for trial in shown}
        reports = [report for latest in found.values() for report in latest]
        return {
            "rows": [
                {"question": row["question"], "reference": row["reference"]}
                for row in (reports[0][LIVE_ANSWERS] if reports else [])
            ],
            "answers": {
                number: [
                    (report["step"], [row["answer"] for row in report[LIVE_ANSWERS]]) for report in latest
                ]
                for number, latest in found.items()
                if latest
            },
        }

    def _trial(self, trial: SavedTrial) -> dict[str, Any]:
        metric = next(iter(self.objectives))
        numbers = {
            name: value
            for name in ("step", "max_steps", "seconds", "train_loss", *self.objectives)
            if isinstance(value := trial.last_report.get(name), int | float) and math.isfinite(value)
        }
        curve = [
            (report["step"], report[metric])
            for report in trial.reports[-MAX_POINTS:]
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


def answered_reports(trial: SavedTrial) -> list[dict[str, Any]]:
    """The reports of a trial that have answers to the fixed rows, in order.

    A resumed search reads them from files, so their form is checked.
    """
    texts = ("question", "reference", "answer")

    def is_row(row: Any) -> bool:
        return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in texts)

    return [
        report
        for report in trial.reports
        if isinstance(rows := report.get(LIVE_ANSWERS), list) and "step" in report and all(map(is_row, rows))
    ]
