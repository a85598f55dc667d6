"""The file that the page of a search reads."""

import json
from pathlib import Path
from typing import Any

from vlmtune.search.live_state import LiveState
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.training.best_evaluation import LIVE_ANSWERS

ENDED = SavedTrial(
    0,
    "a",
    {"lora_r": 8},
    reports=[
        {"step": 2, "max_steps": 4, "eval_loss": 0.5},
        {"step": 4, "max_steps": 4, "eval_loss": 0.4},
    ],
    end=End.LAST_REPORT,
)
RUNNING = SavedTrial(1, "b", {"lora_r": 4}, reports=[{"step": 2, "max_steps": 4, "eval_loss": float("nan")}])


def test_trials_are_written_in_their_order_with_curves(tmp_path: Path) -> None:
    LiveState(str(tmp_path), {"eval_loss": "min"}, 4).write([RUNNING, ENDED], at_once=True)
    state = json.loads((tmp_path / "live.json").read_text())
    assert state["rows"] == [] and state["answers"] == {}
    assert state["running"] and state["total"] == 4 and state["objectives"] == {"eval_loss": "min"}
    first, second = state["trials"]
    assert first == {
        "number": 1,
        "trial_id": "a",
        "state": "COMPLETE",
        "values": {"lora_r": 8},
        "step": 4,
        "max_steps": 4,
        "eval_loss": 0.4,
        "curve": [[2, 0.5], [4, 0.4]],
    }
    assert second["state"] == "RUNNING" and second["curve"] == [] and "eval_loss" not in second


def test_it_is_written_once_a_second_and_at_each_end(tmp_path: Path) -> None:
    live = LiveState(str(tmp_path), {"eval_loss": "min"}, 4)
    live.write([RUNNING], at_once=False)
    live.write([RUNNING, ENDED], at_once=False)
    assert len(json.loads((tmp_path / "live.json").read_text())["trials"]) == 1
    live.write([RUNNING, ENDED], at_once=True, running=False)
    state = json.loads((tmp_path / "live.json").read_text())
    assert len(state["trials"]) == 2 and not state["running"]


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path) -> None:
    live = LiveState(str(tmp_path), {"eval_loss": "min"}, 4)
    live.write([RUNNING], at_once=True)
    live.write_seconds = 1.0  # as with very many trials
    live.write([RUNNING, ENDED], at_once=True)
    assert len(json.loads((tmp_path / "live.json").read_text())["trials"]) == 1
    live.write([RUNNING, ENDED], at_once=True, running=False)
    assert len(json.loads((tmp_path / "live.json").read_text())["trials"]) == 2, "its end is always written"


def test_object_storage_gets_no_file() -> None:
    LiveState("s3://bucket/out", {"eval_loss": "min"}, 4).write([ENDED], at_once=True)


def report(step: int, loss: float, *answers: str) -> dict[str, Any]:
    rows = [{"question": f"q{n}", "reference": f"r{n}", "answer": text} for n, text in enumerate(answers)]
    return {"step": step, "max_steps": 4, "eval_loss": loss, **({LIVE_ANSWERS: rows} if rows else {})}


def test_answers_of_the_best_trial_and_of_those_that_run(tmp_path: Path) -> None:
    trials = [
        SavedTrial(0, "a", {}, reports=[report(2, 0.5, "x", "y"), report(4, 0.4)], end=End.LAST_REPORT),
        SavedTrial(1, "b", {}, reports=[report(4, 0.3, "p", "q")], end=End.LAST_REPORT),
        SavedTrial(2, "c", {}, reports=[report(1, 0.9, "<b>", "s"), report(2, 0.8, "t", "s")]),
        SavedTrial(3, "d", {}, reports=[{"step": 1, "max_steps": 4, LIVE_ANSWERS: [{"answer": 1}]}]),
    ]
    LiveState(str(tmp_path), {"eval_loss": "min"}, 4).write(trials, at_once=True)
    state = json.loads((tmp_path / "live.json").read_text())
    assert state["rows"] == [{"question": f"q{n}", "reference": f"r{n}"} for n in (0, 1)]
    assert state["answers"] == {"2": [[4, ["p", "q"]]], "3": [[1, ["<b>", "s"]], [2, ["t", "s"]]]}
