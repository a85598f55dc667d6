"""Metrics of an engine on the Ray dashboard: slots in use, and seconds of waiting by reason."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ray.util.metrics import Counter, Gauge

Reason = Literal["trials", "decisions"]

SLOTS_USED = "Slots of an engine that hold a trial"
SLOTS = "Slots of an engine: trials that it has memory for"
WAITED = "Seconds that an engine has waited: for trials to train, or for the search's decisions on reports"


class EngineGauges:
    """Ray metrics of one engine. Each has the tag `engine`."""

    def __init__(self, engine: str) -> None:
        self.tags = {"engine": engine}
        self.slots_used = Gauge("vlmtune_engine_slots_used", SLOTS_USED, tag_keys=("engine",))
        self.slots = Gauge("vlmtune_engine_slots", SLOTS, tag_keys=("engine",))
        self.waited = Counter("vlmtune_engine_wait_seconds", WAITED, tag_keys=("engine", "reason"))

    def show_slots(self, used: int, total: int) -> None:
        self.slots_used.set(used, tags=self.tags)
        self.slots.set(total, tags=self.tags)

    @contextmanager
    def waiting_for(self, reason: Reason) -> Iterator[None]:
        """Count the seconds of the block as waited for `reason`."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            if seconds > 0:  # Ray's Counter refuses zero
                self.waited.inc(seconds, tags={**self.tags, "reason": reason})
