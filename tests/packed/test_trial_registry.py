"""Where a trial is between joining an engine and leaving it."""

from typing import Any

import pytest

from vlmtune.packed.messages import TrialReport, UnknownTrialError
from vlmtune.packed.trial_registry import MAX_UNREAD_REPORTS, RegisteredTrial, TrialPhase, TrialRegistry

SLOT: Any = object()
REPORT = TrialReport({"step": 2}, final=False)


def claim(registry: TrialRegistry, name: str) -> RegisteredTrial:
    trial = registry.reserve_slot(name)
    assert trial is not None
    return trial


def training(registry: TrialRegistry, name: str) -> RegisteredTrial:
    trial = claim(registry, name)
    assert registry.set_ready(trial, SLOT)
    assert trial.start_training() is SLOT
    return trial


def test_a_trial_goes_through_its_states() -> None:
    registry = TrialRegistry(1)
    trial = claim(registry, "one")
    assert trial.phase is TrialPhase.PREPARING
    with pytest.raises(UnknownTrialError):
        registry.get_polled("one")
    assert registry.set_ready(trial, SLOT)
    assert trial.phase is TrialPhase.READY
    assert registry.get_polled("one") is trial
    assert trial.start_training() is SLOT
    assert (trial.phase, trial.slot) == (TrialPhase.TRAINING, None)
    assert registry.free_slots == 0
    registry.mark_finished("one")
    assert trial.phase is TrialPhase.FINISHED
    assert registry.get_polled("one") is trial, "its reports can be read"
    assert registry.free_slots == 1
    assert registry.leave("one") is None
    assert registry.get("one") is None


def test_a_trial_that_trains_leaves_before_the_next_round() -> None:
    registry = TrialRegistry(1)
    trial = training(registry, "one")
    for _ in range(2):  # Ray may repeat a call
        assert registry.leave("one") is None
        assert trial.phase is TrialPhase.LEAVING
    assert registry.is_leaving("one")
    assert registry.free_slots == 1
    registry.mark_finished("one")
    assert trial.phase is TrialPhase.LEAVING
    with pytest.raises(UnknownTrialError):
        registry.get_polled("one")


def test_a_trial_that_is_ready_leaves_at_once() -> None:
    registry = TrialRegistry(1)
    assert registry.set_ready(claim(registry, "one"), SLOT)
    assert registry.leave("one") is SLOT
    assert registry.get("one") is None
    assert registry.leave("one") is None


def test_a_trial_that_leaves_while_it_is_prepared_does_not_join() -> None:
    registry = TrialRegistry(1)
    first = claim(registry, "one")
    registry.leave("one")
    assert not registry.set_ready(first, SLOT)
    second = claim(registry, "one")
    assert not registry.set_ready(first, SLOT), "this is another trial of the same trial"
    registry.cancel(first)
    assert registry.get("one") is second


def test_a_repeated_call_shares_the_place_and_the_faster_one_joins() -> None:
    registry = TrialRegistry(1)
    trial = claim(registry, "one")
    assert registry.reserve_slot("one") is trial
    assert registry.reserve_slot("two") is None
    assert registry.set_ready(trial, SLOT)
    assert not registry.set_ready(trial, SLOT)
    registry.cancel(trial)
    assert registry.get("one") is trial, "what has joined is not cancelled"


def test_a_trial_that_cannot_be_prepared_frees_its_place() -> None:
    registry = TrialRegistry(1)
    registry.cancel(claim(registry, "one"))
    assert registry.free_slots == 1
    assert registry.get("one") is None


def test_a_trial_that_had_ended_before_takes_no_place() -> None:
    registry = TrialRegistry(1)
    registry.restore_finished(claim(registry, "one"), REPORT)
    assert registry.get_polled("one").reports == [REPORT]
    assert registry.free_slots == 1


def test_a_trial_waits_until_its_reports_are_read() -> None:
    trial = training(TrialRegistry(1), "one")
    assert (trial.awaits_decision, trial.is_paused) == (False, False)
    trial.reports.append(REPORT)
    assert (trial.awaits_decision, trial.is_paused) == (True, False)
    trial.reports += [REPORT] * (MAX_UNREAD_REPORTS - 1)
    assert (trial.awaits_decision, trial.is_paused) == (False, True)
    trial.next_report = 1
    assert (trial.awaits_decision, trial.is_paused) == (True, False)
    trial.next_report = 2
    assert (trial.awaits_decision, trial.is_paused) == (False, False)


def test_only_a_waiting_trial_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.packed.trial_registry.ABANDONED_AFTER_S", -1.0)
    registry = TrialRegistry(1)
    trial = training(registry, "one")
    assert not trial.is_abandoned
    trial.reports += [REPORT] * MAX_UNREAD_REPORTS
    assert trial.is_abandoned
    registry.mark_finished("one")
    assert not trial.is_abandoned, "it takes no place"
