"""Which of a trial's checkpoints counts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.packed.checkpoint_folder import (
    REPORT_FILE,
    fetch_last_checkpoint,
    read_last_report,
    write_checkpoint,
)
from vlmtune.training.best_evaluation import BEST_STEP, has_ended


def writing(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state").write_text(text)

    return write


def read_last(folder: str) -> str | None:
    with fetch_last_checkpoint(folder) as local:
        return (Path(local) / "state").read_text() if local is not None else None


@pytest.fixture(params=["path", "uri"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "trial") if request.param == "path" else f"file://{tmp_path}/trial"


def test_the_latest_checkpoint_counts_and_the_others_are_deleted(folder: str, tmp_path: Path) -> None:
    assert read_last_report(folder) is None
    assert read_last(folder) is None
    for step in (2, 10):
        write_checkpoint(
            writing(f"of {step}"), f"{folder}/checkpoint-{step}", {"step": step, "max_steps": 10}
        )
    assert [path.name for path in (tmp_path / "trial").iterdir()] == ["checkpoint-10"]
    report = read_last_report(folder)
    assert report == {"step": 10, "max_steps": 10}
    assert has_ended(report)
    assert not has_ended({"step": 9, "max_steps": 10})
    assert read_last(folder) == "of 10"


def test_that_of_the_best_evaluation_is_kept_beside_the_latest(folder: str, tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
        metrics = {"step": step, "max_steps": 10, BEST_STEP: best}
        write_checkpoint(writing(f"of {step}"), f"{folder}/checkpoint-{step}", metrics)
    kept = {path.name for path in (tmp_path / "trial").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-8"}
    assert read_last(folder) == "of 8", "a trial resumes from its last one"


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(folder: str, tmp_path: Path) -> None:
    write_checkpoint(writing("whole"), f"{folder}/checkpoint-2", {"step": 2, "max_steps": 10})
    begun = tmp_path / "trial" / "checkpoint-4"
    begun.mkdir()
    (begun / "state").write_text("half")
    assert not (begun / REPORT_FILE).exists()
    report = read_last_report(folder)
    assert report is not None
    assert report["step"] == 2
    assert read_last(folder) == "whole"


def test_a_checkpoint_can_be_written_again_over_one_that_was_not_finished(
    folder: str, tmp_path: Path
) -> None:
    begun = tmp_path / "trial" / "checkpoint-4"
    begun.mkdir(parents=True)
    (begun / "state").write_text("half")
    write_checkpoint(writing("whole"), f"{folder}/checkpoint-4", {"step": 4, "max_steps": 10})
    assert read_last(folder) == "whole"
