"""Ctrl-C and SIGTERM in a process of its own."""

import signal
import subprocess
import sys

import pytest

# Ray, too, raises a plain KeyboardInterrupt where a signal arrives in one of its calls.
PROGRAM = """
import time
from vlmtune.errors import RunInterrupted, plain_user_errors
from vlmtune.stop_signals import exit_code
with plain_user_errors():
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt as interrupt:
        try:
            print("leaving", flush=True)
            if {slow}:
                time.sleep(60)
        finally:
            plain = KeyboardInterrupt() if {plain} else interrupt
            raise RunInterrupted("python ray_jobs/tune.py --resume /out", exit_code(plain)) from None
"""


def begun(*, slow: bool, plain: bool = False) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(slow=slow, plain=plain)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "Interrupted", 130), (signal.SIGTERM, "Terminated", 143)]
)
@pytest.mark.parametrize("plain", [False, True])
def test_the_first_signal_ends_a_command_in_order(number: int, word: str, code: int, plain: bool) -> None:
    process = begun(slow=False, plain=plain)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr == f"{word}. To resume: python ray_jobs/tune.py --resume /out\n"


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_it_at_once_without_a_traceback(second: int, code: int) -> None:
    process = begun(slow=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(second)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (code, "")


PROGRAM_OF_ITS_OWN = """
import signal
from vlmtune.cluster import connect
from vlmtune.errors import plain_user_errors
mine = lambda number, frame: None
signal.signal(signal.SIGTERM, mine)
before = signal.getsignal(signal.SIGINT)
connect()
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (before, mine)
with plain_user_errors():
    assert signal.getsignal(signal.SIGTERM) is not mine
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (before, mine)
"""


def test_a_program_gets_its_own_handlers_back() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM_OF_ITS_OWN], check=True, timeout=90)
