"""Handles Ctrl-C and SIGTERM: the first one ends a command after its clean-up, a second one at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # the exit codes of a program that Ctrl-C or SIGTERM ended

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_received: list[int] = []  # the stop signals so far


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they take a machine back."""


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end of the block.

    `ray.init` and Ray Train set handlers of their own; the one of SIGTERM prints a C++ stack and aborts.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: C code has set the handler, and Python cannot set it again
                    signal.signal(number, handler)


@contextmanager
def handled_stop_signals() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated` in the main thread, within the block.

    Commands use it; a program that uses vlmtune as a library keeps its own handlers.
    """
    with kept_signal_handlers():
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, _stop)
        yield


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a program that `interrupt` ends.

    If `Terminated` is raised inside a call of Ray, Ray raises a plain KeyboardInterrupt instead.
    """
    terminated = isinstance(interrupt, Terminated) or _received[-1:] == [signal.SIGTERM]
    return TERMINATED if terminated else INTERRUPTED


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > 1:
        # The first signal has begun the clean-up. Ray's processes end with this one.
        os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
