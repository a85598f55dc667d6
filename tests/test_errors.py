"""How a command ends after an error."""

import pytest

from vlmtune.errors import DataError, SearchFailedError, SearchInterrupted, plain_user_errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("row 3: no image"), 2, "error: row 3: no image\n"),
        (KeyboardInterrupt(), 130, "Interrupted. Rerun the same command to resume.\n"),
        (
            SearchInterrupted("/out"),
            130,
            "Interrupted. To resume: python ray_jobs/tune.py --resume /out\n",
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
