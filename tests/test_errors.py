"""How a command ends after an error."""

from pathlib import Path

import pytest

from vlmtune.errors import (
    DataError,
    ResourceError,
    RunInterrupted,
    RunStoppedError,
    SearchFailedError,
    named_interrupt,
    plain_user_errors,
    writable,
)
from vlmtune.stop_signals import Terminated


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("row 3: no image"), 2, "error: row 3: no image\n"),
        (KeyboardInterrupt(), 130, "Interrupted. Rerun the same command to resume.\n"),
        (Terminated(), 143, "Terminated. Rerun the same command to resume.\n"),
        (RunStoppedError("--output_dir /out: is full"), 1, "error: --output_dir /out: is full\n"),
        (
            RunInterrupted("python ray_jobs/tune.py --resume /out", 143),
            143,
            "Terminated. To resume: python ray_jobs/tune.py --resume /out\n",
        ),
        (
            RunInterrupted("python ray_jobs/train.py --resume /out"),
            130,
            "Interrupted. To resume: python ray_jobs/train.py --resume /out\n",
        ),
        (SearchFailedError("no trial ran to its end"), 1, "error: no trial ran to its end\n"),
    ],
)
def test_an_error_ends_the_command_with_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, plain_user_errors("Rerun the same command to resume."):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_an_interrupt_names_what_resumes_the_run_once_there_is_something() -> None:
    with pytest.raises(RunInterrupted) as caught, named_interrupt(lambda: "tune --resume /out"):
        raise Terminated
    assert (caught.value.resume, caught.value.code) == ("tune --resume /out", 143)
    with pytest.raises(Terminated), named_interrupt(lambda: None):
        raise Terminated


def test_a_write_that_fails_names_the_folder_and_its_flag(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ResourceError, match=r"--cache_dir /full: cannot be written: .* No space left"
        ) as caught,
        writable("/full", "--cache_dir"),
    ):
        raise OSError(28, "Error writing bytes to file. No space left on device")
    assert "give --cache_dir a folder with space that you may write to" in str(caught.value)
    with writable(str(tmp_path), "--cache_dir"):
        (tmp_path / "a").write_text("x")
