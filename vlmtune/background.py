"""Run a function in a daemon thread, which does not keep its process from exiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` in a daemon thread called `name`. The future gets its result or its exception.

    An executor is not used, because Python waits for an executor's threads at exit: a thread that never ends
    would keep its process, and its GPU, for ever.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # `future.result()` raises it  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
