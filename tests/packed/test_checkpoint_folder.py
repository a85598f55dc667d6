"""Which of a trial's checkpoints counts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.packed.checkpoint_folder import (
    REPORT_FILE,
    fetch_last_checkpoint,
    read_last_report,
    write_checkpoint,
)
from vlmtune.training.best_evaluation import BEST_STEP, ran_to_its_end


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


def write_steps(folder: str, *steps: int, best: int | None = None) -> None:
    for step in steps:
        metrics = {"step": step, "max_steps": 10} | ({} if best is None else {"best_step": min(step, best)})
        write_checkpoint(writing(f"of {step}"), f"{folder}/checkpoint-{step}", metrics)


def test_the_latest_checkpoint_counts_and_the_one_before_and_the_best_are_kept(
    folder: str, tmp_path: Path
) -> None:
    assert read_last_report(folder) is None
    assert read_last(folder) is None
    write_steps(folder, 2, 4, 6, 8, 10)
    assert {path.name for path in (tmp_path / "trial").iterdir()} == {"checkpoint-8", "checkpoint-10"}
    shutil.rmtree(tmp_path / "trial")
    write_steps(folder, 2, 4, 6, 8, 10, best=4)
    names = {"checkpoint-4", "checkpoint-8", "checkpoint-10"}
    assert {path.name for path in (tmp_path / "trial").iterdir()} == names
    report = read_last_report(folder)
    assert report == {"step": 10, "max_steps": 10, "best_step": 4}
    assert ran_to_its_end(report)
    assert not ran_to_its_end({"step": 9, "max_steps": 10})
    assert read_last(folder) == "of 10"


def test_that_of_the_best_evaluation_is_kept_beside_the_last_two(folder: str, tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
        metrics = {"step": step, "max_steps": 10, BEST_STEP: best}
        write_checkpoint(writing(f"of {step}"), f"{folder}/checkpoint-{step}", metrics)
    kept = {path.name for path in (tmp_path / "trial").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["state", REPORT_FILE, "checksums.json"])
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_the_checkpoint_before_a_damaged_one_counts_and_that_is_told(
    folder: str, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write_steps(folder, 8, 10)
    damage(tmp_path / "trial" / "checkpoint-10" / name)
    lines: list[str] = []
    report = read_last_report(folder, lines.append)
    if damage is Path.unlink and name == "checksums.json":  # as an older vlmtune wrote it
        assert read_last(folder) == "of 10"
        return
    assert report is not None
    assert (report["step"], read_last(folder)) == (8, "of 8")
    if damage is Path.unlink and name == REPORT_FILE:  # as if it was never written to its end
        return
    assert len(lines) == 1
    assert "checkpoint-10" in lines[0]
    assert "the checkpoint before step 10 is used" in lines[0]
