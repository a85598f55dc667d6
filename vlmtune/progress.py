"""Estimate how long some work still takes, from the work that is done and the time since it began."""

import time
from collections.abc import Callable

# With less work done or in less time, an estimate would be a guess.
LEAST_SHARE = 0.02  # share of the work
LEAST_SECONDS = 2.0


def duration_text(seconds: float) -> str:
    """A duration as people say it: `40 s`, `11 minutes`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} minutes"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 60} h"


class Estimate:
    """Estimates the seconds that some work still takes.

    Time counts from the first call of `left`. Work before it, such as loading a model or the steps before a
    resume, does not count.

    Args:
        clock: returns the present time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started: float | None = None
        self.done_before = 0.0

    def left(self, done: float, total: float) -> float | None:
        """Seconds until `total` units of work are done; None while too little is done for an estimate."""
        now = self.clock()
        if self.started is None:
            self.started, self.done_before = now, done
            return None
        fresh, elapsed = done - self.done_before, now - self.started
        if fresh < LEAST_SHARE * total or elapsed < LEAST_SECONDS or fresh <= 0:
            return None
        return max(0.0, elapsed / fresh * (total - done))

    def text(self, done: float, total: float) -> str:
        """`about 40 s left`; an empty text while too little is done for an estimate."""
        seconds = self.left(done, total)
        return "" if seconds is None or done >= total else f"about {duration_text(seconds)} left"
