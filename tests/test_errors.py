"""What an entry point makes of an error."""

import pytest

from vlmtune.errors import DataError, plain_user_errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("row 3: no image"), 2, "error: row 3: no image\n"),
        (KeyboardInterrupt(), 130, "Interrupted. The same command goes on with it.\n"),
    ],
)
def test_an_end_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, plain_user_errors("The same command goes on with it."):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == line
