"""End a run with one line when its Ray has died. Ray itself would wait a minute and then abort in C++."""

import os
import select
import socket
import sys
import threading
import time

from vlmtune.compat.ray_node import control_processes
from vlmtune.errors import FAULT

CHECK_S = 5.0  # seconds between two attempts to reach the GCS (Ray's control service) of a cluster
GONE_AFTER_S = 30.0  # seconds without an answer after which the GCS is gone; a restarted one is back sooner


class RayWatch:
    """A thread that watches Ray's processes from `start` to `stop`, and ends this process if one dies.

    Args:
        resume: the command that resumes the run; None while there is nothing to resume.

    Attributes:
        resume: as the argument. It may change while the watch runs.
    """

    def __init__(self, resume: str | None = None) -> None:
        self.resume = resume
        self._stopped, self._wake = os.pipe()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch the Ray that this process has started, or the address that it has joined."""
        own = control_processes()
        address = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://")
        if own and sys.platform == "linux":  # only Linux has file descriptors of processes
            work = threading.Thread(target=self._watch_processes, args=(own,), daemon=True)
        elif address.rpartition(":")[2].isdigit():
            work = threading.Thread(target=self._watch_address, args=(address,), daemon=True)
        else:
            return
        self._thread = work
        work.start()

    def stop(self) -> None:
        """Stop watching. Call it before Ray is shut down."""
        os.write(self._wake, b".")
        if self._thread is not None:
            self._thread.join(timeout=CHECK_S)

    def _watch_processes(self, own: dict[str, int]) -> None:
        names = {}
        for name, pid in own.items():
            try:
                names[os.pidfd_open(pid)] = name
            except ProcessLookupError:
                self._end(name)
        readable, _, _ = select.select([self._stopped, *names], [], [])
        if self._stopped not in readable:
            self._end(names[readable[0]])

    def _watch_address(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        answered = time.monotonic()
        while not select.select([self._stopped], [], [], CHECK_S)[0]:
            try:
                socket.create_connection((host, int(port)), timeout=CHECK_S).close()
                answered = time.monotonic()
            except OSError:
                if time.monotonic() - answered > GONE_AFTER_S:
                    self._end(f"GCS at {address}")

    def _end(self, name: str) -> None:
        """Exit at once, because other threads wait for an answer of Ray that will not come."""
        hint = "" if self.resume is None else f". To resume: {self.resume}"
        print(f"error: Ray's {name} has ended, and the run with it{hint}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(FAULT)
