"""How far a search is and how long it still takes, from the last report of each trial."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.config.search_options import SearchSettings
from vlmtune.progress import LEAST_SHARE, duration_text

RUNNING = "running"


@dataclass(frozen=True)
class ExpectedSteps:
    """How many of its steps a trial is expected to train.

    Attributes:
        rungs: shares of a run at which early stopping may stop it, in order; empty without early stopping.
        passing: the share of the trials that continue at each of them.
    """

    rungs: tuple[float, ...] = ()
    passing: float = 1.0

    @classmethod
    def of(cls, search: SearchSettings) -> "ExpectedSteps":
        """With ASHA, 1 of `reduction_factor` trials continues at each rung."""
        if search.early_stopping == "none":
            return cls()
        rungs, rung = [], search.grace_period
        while rung < 1:
            rungs.append(rung)
            rung *= search.reduction_factor
        return cls(tuple(rungs), 1 / search.reduction_factor)

    def left(self, trained: float = 0.0) -> float:
        """The share of its steps that a trial is expected to train yet, after it has trained this share."""
        left, reaching, before = 0.0, 1.0, trained
        for rung in (*(rung for rung in self.rungs if rung > trained), 1.0):
            left += reaching * (rung - before)
            before, reaching = rung, reaching * self.passing
        return left


class SearchProgress:
    """Estimates the time of a search. Its unit of work is a trial that trains all its steps.

    Args:
        total: number of trials.
        expected: the steps that a trial is expected to train.
        at_once: number of engines, or of isolated trials, that train side by side.
        confirmations: number of whole runs that follow when all trials have ended.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        expected: ExpectedSteps | None = None,
        at_once: int = 1,
        confirmations: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.expected, self.clock = total, expected or ExpectedSteps(), clock
        self.at_once, self.confirmations = at_once, confirmations
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
        ahead = [self.expected.left(_share(row)) for row in known if row["state"] == RUNNING]
        ahead += [self.expected.left()] * max(0, self.total - len(known))
        if self.started is None or done <= 0 or done < LEAST_SHARE * (done + sum(ahead)):
            return None
        elapsed = self.clock() - self.started
        runs = longest_queue(ahead, self.at_once) + longest_queue([1.0] * self.confirmations, self.at_once)
        left = elapsed / done * self.at_once * runs
        return left, elapsed + left

    def line(self, rows: Iterable[Mapping[str, Any]], best: str | None) -> str:
        """`12/16 trials, best 0.013, about 40 s left`."""
        known = list(rows)
        ended = sum(row["state"] != RUNNING for row in known)
        parts = [f"{ended}/{self.total} trials"]
        if best is not None:
            parts.append(f"best {best}")
        estimate = self.seconds(known)
        if estimate is not None and (ended < self.total or self.confirmations):
            parts.append(f"about {duration_text(estimate[0])} left")
        return ", ".join(parts)

    def cost(self, rows: Iterable[Mapping[str, Any]], device: str) -> str | None:
        """`16 trials x 240 steps, about 11 minutes on this GPU`; None while too little is done to tell."""
        known = list(rows)
        estimate = self.seconds(known)
        steps = next((row["max_steps"] for row in known if "max_steps" in row), None)
        if estimate is None or steps is None:
            return None
        stopping = "up to " if self.expected.rungs else ""
        again = f" and {self.confirmations} to confirm the best" if self.confirmations else ""
        seconds = duration_text(estimate[1])
        return f"{self.total} trials x {stopping}{steps} steps{again}, about {seconds} on this {device}"


def longest_queue(work: Iterable[float], queues: int) -> float:
    """The work in the longest queue, if each piece joins the shortest one, the largest pieces first."""
    lengths = [0.0] * queues
    for piece in sorted(work, reverse=True):
        lengths[lengths.index(min(lengths))] += piece
    return max(lengths)


def _share(row: Mapping[str, Any]) -> float:
    """The share of its steps that a trial has trained."""
    return row["step"] / row["max_steps"] if row.get("max_steps") else 0.0
