"""The thread of an engine's actor: what it waits for between rounds."""

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from vlmtune.background import in_background
from vlmtune.packed.engine_gauges import EngineGauges
from vlmtune.packed.engine_loop import EngineLoop
from vlmtune.packed.messages import NoteLog, TrialReport
from vlmtune.packed.trial_registry import RegisteredTrial, TrialPhase, TrialRegistry

REPORT = TrialReport({"step": 2}, final=False)


def training(registry: TrialRegistry, name: str, **changes: Any) -> RegisteredTrial:
    trial = registry.reserve_slot(name)
    assert trial is not None
    trial.phase = TrialPhase.TRAINING
    for attribute, value in changes.items():
        setattr(trial, attribute, value)
    return trial


def test_the_search_has_a_moment_to_stop_trials() -> None:
    registry = TrialRegistry(3)
    engine: Any = SimpleNamespace(slots=dict.fromkeys(("one", "two", "gone")), round_seconds=60.0)
    loop = EngineLoop(registry, NoteLog(), EngineGauges("one"), early_stopping=True)
    one, two = (training(registry, name, reports=[REPORT]) for name in ("one", "two"))
    gone = training(registry, "gone", reports=[REPORT], next_report=1)
    waiting = in_background(partial(loop._wait_for_search, engine), "waiting")
    with registry.changed:
        one.next_report = 1
        registry.changed.notify_all()
    time.sleep(0.1)
    assert not waiting.done(), "nothing is known of the other"
    with registry.changed:
        registry.leave("two")
        registry.changed.notify_all()
    waiting.result(10)
    assert two.phase is TrialPhase.LEAVING
    gone.reports, gone.next_report = [REPORT, REPORT], 0
    started = time.monotonic()
    loop._wait_for_search(engine)  # it waits itself, so there are no rows of it to wait for
    assert time.monotonic() - started < 10
    engine.round_seconds, one.next_report = 0.2, 0
    started = time.monotonic()
    loop._wait_for_search(engine)
    assert 0.03 < time.monotonic() - started < 10, "a sixth of it: half of the rows of one of three trials"


def test_a_report_of_a_trial_that_has_left_is_dropped() -> None:
    registry = TrialRegistry(1)
    loop = EngineLoop(registry, NoteLog(), EngineGauges("one"), early_stopping=True)
    trial = training(registry, "one")
    loop.deliver("one", REPORT)
    registry.leave("one")
    loop.deliver("one", REPORT)
    loop.deliver("unknown", REPORT)
    assert trial.reports == [REPORT]
