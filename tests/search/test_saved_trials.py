"""The files of a search's trials: written whole, found again, and what damage costs."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.packed.checkpoint_folder import write_checkpoint
from vlmtune.packed.messages import BEST_CHECKPOINT
from vlmtune.search.saved_trials import (
    COPY,
    KEPT_ANSWERS,
    End,
    SavedTrial,
    SavedTrials,
    from_text,
    paths_of,
    read_trials,
    to_text,
)
from vlmtune.training.best_evaluation import LIVE_ANSWERS


def trial(number: int, folder: str, *, steps: int = 4, end: End | None = None) -> SavedTrial:
    one = SavedTrial(number, f"id{number}", {"lora_r": 4, "lora_target_modules": ["q_proj"]}, {"lora_r": 0})
    for step in range(2, steps + 1, 2):
        path = f"{folder}/tune/train/id{number}/checkpoint-{step}"
        one.add_report(
            {"step": step, "max_steps": 8, "eval_loss": 1 / step, "checkpoint_path": path, "pid": 7}
        )
    one.end = end
    return one


@pytest.fixture(params=["path", "uri"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "path" else f"file://{tmp_path}/out"


def save(folder: str, *trials: SavedTrial) -> None:
    saved = SavedTrials(folder)
    for one in trials:
        saved.save(one)
    saved.flush()
    assert saved.error is None


def test_trials_are_read_as_they_were(folder: str) -> None:
    trials = [
        trial(2, folder),
        trial(0, folder, steps=8, end=End.LAST_REPORT),
        trial(1, folder, end=End.DIVERGED),
    ]
    trials[2].reports[-1]["eval_loss"] = math.nan
    save(folder, *trials)
    read, damaged = read_trials(folder)
    assert not damaged
    assert [repr(one) for one in read] == [repr(one) for one in sorted(trials, key=lambda one: one.number)]
    assert "pid" not in read[0].last_report


def test_a_moved_search_names_its_checkpoints_in_the_new_place(tmp_path: Path) -> None:
    save(f"{tmp_path}/old", trial(0, f"{tmp_path}/old", end=End.LAST_REPORT))
    (tmp_path / "old").rename(tmp_path / "new")
    (one,), _ = read_trials(f"{tmp_path}/new")
    assert one.last_report["checkpoint_path"] == f"{tmp_path}/new/tune/train/id0/checkpoint-4"


def test_a_trial_that_repeats_its_steps_has_each_report_once() -> None:
    one = trial(0, "out", steps=6)
    one.add_report({"step": 4, "max_steps": 8, "eval_loss": 0.5})
    assert [report["step"] for report in one.reports] == [2, 4]


def test_only_what_was_not_a_trials_own_end_is_reopened() -> None:
    ends = {}
    for end in (None, *End):
        one = SavedTrial(0, "a", {}, end=end)
        one.reopen()
        ends[end] = one.end
    assert ends == {end: None if end in (End.BUDGET, End.ERROR, End.LOST) else end for end in (None, *End)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35"))


def foreign(path: Path) -> None:
    path.write_bytes(b"[1, 2]")


DAMAGES = pytest.mark.parametrize(
    "damage", [cut, empty, flip, foreign, Path.unlink], ids=lambda one: one.__name__
)


@DAMAGES
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_file_loses_nothing(damage: Callable[[Path], None], which: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    one = trial(0, folder, end=End.LAST_REPORT)
    save(folder, one)
    damage(Path(paths_of(one, folder)[which]))
    read, damaged = read_trials(folder)
    assert ([repr(other) for other in read], damaged) == ([repr(one)], [])


def test_a_trial_whose_files_are_both_damaged_is_told(tmp_path: Path) -> None:
    folder = str(tmp_path)
    trials = [trial(0, folder), trial(1, folder)]
    save(folder, *trials)
    for path in paths_of(trials[0], folder):
        cut(Path(path))
    read, damaged = read_trials(folder)
    assert [one.number for one in read] == [1]
    assert damaged == [f"train/id0/{COPY}"]


def test_the_folder_of_all_trials_may_be_gone(tmp_path: Path) -> None:
    save(str(tmp_path), trial(0, str(tmp_path)), trial(1, str(tmp_path)))
    shutil.rmtree(tmp_path / "tune" / "trials")
    assert [one.number for one in read_trials(str(tmp_path))[0]] == [0, 1]


def test_a_checkpoint_that_is_newer_than_the_files_counts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    save(folder, trial(0, folder, steps=2))
    path = f"{folder}/tune/train/id0/checkpoint-4"
    moved = "/old/place/tune/train/id0/checkpoint-4"
    report = {"step": 4, "max_steps": 8, "eval_loss": 0.2, "checkpoint_path": moved}
    write_checkpoint(lambda _: None, path, report)
    (one,), _ = read_trials(folder)
    assert [report["step"] for report in one.reports] == [2, 4]
    assert one.last_report["checkpoint_path"] == path


def test_a_disk_that_fails_is_kept_as_the_error(tmp_path: Path) -> None:
    (tmp_path / "tune").write_text("a file where the folder should be")
    saved = SavedTrials(str(tmp_path))
    saved.save(trial(0, str(tmp_path)))
    saved.flush()
    assert isinstance(saved.error, OSError)


MADE_UP = {
    "no end": {"end": "made up"},
    "a folder outside": {"trial_id": "../../../etc"},
    "no id": {"trial_id": 5},
    "a number in words": {"number": "x"},
    "reports that are none": {"reports": 5},
    "a report that is none": {"reports": [7]},
    "a checkpoint that climbs": {"reports": [{"step": 1, BEST_CHECKPOINT: "tune/../../../etc"}]},
    "a step in words": {"reports": [{"step": "x"}]},
    "another field": {"more": 1},
    "values that are none": {"values": []},
}


@pytest.mark.parametrize("what", MADE_UP)
def test_a_file_with_a_right_checksum_and_something_else_in_it_is_damaged(what: str, tmp_path: Path) -> None:
    whole = {"number": 0, "trial_id": "a", "values": {}, "parameters": None, "origin": "grid"}
    whole |= {"reports": [], "end": None, "error": None}

    def text(values: object) -> str:
        body = json.dumps(values)
        digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
        return json.dumps({"checksum": digest, "trial": body})

    assert from_text(text(whole), str(tmp_path)) is not None
    assert from_text(text({**whole, **MADE_UP[what]}), str(tmp_path)) is None
    for other in ([], 5, None, "x", {}):
        assert from_text(text(other), str(tmp_path)) is None
        assert from_text(json.dumps(other), str(tmp_path)) is None


def test_only_the_latest_reports_keep_their_answers() -> None:
    one = SavedTrial(0, "id0", {})
    for step in range(1, 7):
        answers = {} if step == 5 else {LIVE_ANSWERS: [{"answer": str(step)}]}
        one.add_report({"step": step, "max_steps": 9, "eval_loss": 1.0, **answers})
    assert [report["step"] for report in one.reports] == [1, 2, 3, 4, 5, 6]
    assert [report["step"] for report in one.reports if LIVE_ANSWERS in report] == [3, 4, 6]
    assert KEPT_ANSWERS == 3
    assert from_text(to_text(one, "/out"), "/out") == one
