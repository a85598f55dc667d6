"""Work in a daemon thread, which does not keep its process from exiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` in a daemon thread called `name`. The future gets its result or its exception.

    An executor would not do: Python waits for an executor's threads at exit, so a thread that never ends
    would keep its process, and a GPU, for ever.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # `future.result()` raises it  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
