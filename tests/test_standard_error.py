import os

import pytest

from vlmtune.standard_error import captured_stderr


def test_what_is_written_in_the_block_is_kept_and_shown_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as printed:
        os.write(2, b"as C++ code writes\n")
    os.write(2, b"after it\n")
    assert printed == ["as C++ code writes\n"]
    assert capfd.readouterr().err == "after it\n"
