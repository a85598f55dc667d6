"""How far a search is and how long it still takes, from the last report of each trial."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlmtune.progress import LEAST_SHARE, duration_text

RUNNING = "running"


class SearchProgress:
    """Estimates the time of a search. Its unit of work is a trial that trains all its steps.

    Args:
        total: number of trials.
        expected_fraction: the share of its steps that a trial is expected to train; below 1 with early
            stopping.
        clock: returns the time in seconds.
    """

    def __init__(
        self, total: int, expected_fraction: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.expected_fraction, self.clock = total, expected_fraction, clock
        self.started: float | None = None
        self.done_before = 0.0

    def start(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Begin to measure time, when the first trial starts.

        Steps that `rows` have done before do not count.
        """
        if self.started is None:
            self.started, self.done_before = self.clock(), sum(map(_share, rows))

    def seconds(self, rows: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
        """(seconds left, seconds in all) at the pace so far; None while too little is done to tell."""
        known = list(rows)
        done = sum(map(_share, known)) - self.done_before
        ahead = sum(
            max(0.0, self.expected_fraction - _share(row)) for row in known if row["state"] == RUNNING
        )
        ahead += self.expected_fraction * max(0, self.total - len(known))
        if self.started is None or done <= 0 or done < LEAST_SHARE * (done + ahead):
            return None
        elapsed = self.clock() - self.started
        left = elapsed / done * ahead
        return left, elapsed + left

    def line(self, rows: Iterable[Mapping[str, Any]], best: str | None) -> str:
        """`12/16 trials, best 0.013, about 40 s left`."""
        known = list(rows)
        ended = sum(row["state"] != RUNNING for row in known)
        parts = [f"{ended}/{self.total} trials"]
        if best is not None:
            parts.append(f"best {best}")
        estimate = self.seconds(known)
        if estimate is not None and ended < self.total:
            parts.append(f"about {duration_text(estimate[0])} left")
        return ", ".join(parts)

    def cost(self, rows: Iterable[Mapping[str, Any]], device: str) -> str | None:
        """`16 trials x 240 steps, about 11 minutes on this GPU`; None while too little is done to tell."""
        known = list(rows)
        estimate = self.seconds(known)
        steps = next((row["max_steps"] for row in known if "max_steps" in row), None)
        if estimate is None or steps is None:
            return None
        stopping = "up to " if self.expected_fraction < 1 else ""
        seconds = duration_text(estimate[1])
        return f"{self.total} trials x {stopping}{steps} steps, about {seconds} on this {device}"


def expected_fraction(early_stopping: str, grace_period: float, reduction_factor: int) -> float:
    """The mean share of its steps that a trial trains, if ASHA's rungs pass 1 trial in `reduction_factor`."""
    if early_stopping == "none":
        return 1.0
    share, passing, rung = 0.0, 1.0, grace_period
    before = 0.0
    while rung < 1:
        share += passing * (rung - before)
        passing, before, rung = passing / reduction_factor, rung, rung * reduction_factor
    return share + passing * (1 - before)


def _share(row: Mapping[str, Any]) -> float:
    """The share of its steps that a trial has trained."""
    return row["step"] / row["max_steps"] if row.get("max_steps") else 0.0
