"""What trials and engines send each other."""

import pickle

from vlmtune.config.settings import Settings
from vlmtune.packed.messages import Availability, NoteLog, TrialReport, TrialRequest


def test_the_engine_that_has_the_trial_is_the_best_choice_then_the_emptiest() -> None:
    vacancies = [
        Availability(False, 0),
        Availability(False, 5),
        Availability(True, 0),
        Availability(False, 2),
    ]
    assert sorted(vacancies, reverse=True) == [
        Availability(True, 0),
        Availability(False, 5),
        Availability(False, 2),
        Availability(False, 0),
    ]


def test_messages_cross_process_boundaries() -> None:
    request = TrialRequest("one", Settings.from_flags({"lora_r": 4}), "folder", "runs")
    report = TrialReport({"step": 2}, final=True)
    assert pickle.loads(pickle.dumps((request, report))) == (request, report)


def test_each_line_is_sent_once() -> None:
    notes = NoteLog()
    assert notes.take_unsent() == []
    notes.add("one")
    notes.add("two")
    assert notes.take_unsent() == ["one", "two"]
    notes.add("three")
    assert notes.take_unsent() == ["three"]
    assert notes.lines == ["one", "two", "three"]
