"""Ctrl-C and SIGTERM: the first one ends a command in order, the second one at once."""

import os
import signal
import threading
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # the exit codes of a program that Ctrl-C or SIGTERM ended

_received: list[int] = []  # the stop signals so far
_handled: list[bool] = []  # one entry once `handle_stop_signals` was called


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they take a machine."""


def handle_stop_signals() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated` in the main thread.

    Commands call it; a program that uses vlmtune as a library keeps its own handlers.
    """
    if threading.current_thread() is threading.main_thread():
        _handled[:] = [True]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


def take_back_stop_signals() -> None:
    """Set the handlers again after Ray has set its own, which prints a C++ stack and aborts on SIGTERM."""
    if _handled:
        handle_stop_signals()


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a program that `interrupt` ends.

    Ray raises a plain KeyboardInterrupt where `Terminated` was raised inside one of its calls.
    """
    terminated = isinstance(interrupt, Terminated) or _received[-1:] == [signal.SIGTERM]
    return TERMINATED if terminated else INTERRUPTED


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > 1:
        # Ray's processes end with this one. Leaving in order is what the first signal has begun.
        os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
