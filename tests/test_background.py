"""Work in a thread that does not keep its process."""

import subprocess
import sys

import pytest

from vlmtune.background import in_background


def test_it_returns_and_raises_what_the_work_does() -> None:
    assert in_background(lambda: 3, "three").result(timeout=10) == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, "nothing").result(timeout=10)


def test_a_process_ends_with_work_that_never_does() -> None:
    code = """
import time
from vlmtune.background import in_background
in_background(lambda: time.sleep(1000), 'long')
print('end')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "end\n")
