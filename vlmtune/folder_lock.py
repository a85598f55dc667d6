"""The lock of an output folder: one process at a time writes into the folder.

On a local disk the lock is a `flock`, which the kernel frees when the process ends, however it ends. In an
object store the lock is a file that its owner renews. A lock that was not renewed for LEASE_S seconds is
free.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow.fs as pafs

from vlmtune import storage
from vlmtune.errors import ConfigError
from vlmtune.faults import disk_reason

LOCK_FILE = ".lock"
RENEW_S = 10.0  # seconds between two renewals of a lock in an object store
LEASE_S = 45.0  # seconds without a renewal after which a lock in an object store is free
SETTLE_S = 1.0  # seconds after which two processes that took the lock at once can see which of them has it


class FolderLock:
    """Holds the lock of one folder from `acquire` to `release`.

    Args:
        folder: absolute path or URI.
        flag: the option that names the folder, for messages.
    """

    def __init__(self, folder: str, flag: str = "--output_dir") -> None:
        self.folder, self.flag = folder, flag
        self._files, self._inner = storage.filesystem(folder)
        self._made: list[str] = []  # folders that did not exist before, the innermost first
        self._local: int | None = None  # file descriptor of the locked file
        self._lease: _Lease | None = None

    @property
    def path(self) -> str:
        return f"{self._inner}/{LOCK_FILE}"

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it, or the folder cannot be made or written.
        """
        try:
            if isinstance(self._files, pafs.LocalFileSystem):
                self._acquire_local()
            else:
                self._lease = _Lease(self._files, self.path)
                holder = self._lease.take()
                if holder is not None:
                    self._lease = None
                    raise ConfigError(self._refusal(holder))
        except OSError as error:
            reason = disk_reason(error) or error.strerror or storage.one_line(error)
            raise ConfigError(f"{self.flag} {self.folder}: cannot be written to: {reason}") from error

    def release(self) -> None:
        """Release the lock, and remove the empty folders that it made. May be called twice."""
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None
        if self._local is not None:
            Path(self.path).unlink(missing_ok=True)
            os.close(self._local)
            self._local = None
            for folder in self._made:
                try:
                    Path(folder).rmdir()
                except OSError:  # it holds results
                    return

    def _acquire_local(self) -> None:
        folder = Path(self._inner)
        self._made = [str(one) for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        while self._local is None:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_owner(os.pread(number, 4096, 0))
                os.close(number)
                self._made = []
                raise ConfigError(self._refusal(holder)) from None
            if _is_same_file(number, self.path):
                os.ftruncate(number, 0)
                os.pwrite(number, json.dumps(_owner()).encode(), 0)
                self._local = number
            else:  # its last owner has removed it in the meantime
                os.close(number)

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return (
            f"{self.flag} {self.folder}: {who} is writing into it; wait for its end, or choose another folder"
        )


class _Lease:
    """A lock file in an object store, which a thread renews."""

    def __init__(self, files: pafs.FileSystem, path: str) -> None:
        self.files, self.path, self.token = files, path, uuid.uuid4().hex
        self._ended = Event()

    def take(self) -> dict[str, Any] | None:
        """Take the lease and renew it from then on; returns its holder if it is not free."""
        before = self._read()
        if before and not _is_dead(before) and not self._expires(before):
            return before
        self._write()
        time.sleep(SETTLE_S)
        now = self._read()
        if now.get("token") != self.token:
            return now
        Thread(target=self._renew, name="folder lock", daemon=True).start()
        return None

    def give_back(self) -> None:
        """Stop to renew the lease, and delete its file."""
        self._ended.set()
        if self._read().get("token") == self.token:
            self.files.delete_file(self.path)

    def _expires(self, before: dict[str, Any]) -> bool:
        """Wait until the holder renews its lock (False), or until LEASE_S have passed without that (True).

        The clocks of two machines differ, so only a change of the file counts.
        """
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline:
            time.sleep(1.0)
            now = self._read()
            if not now:
                return True
            if now != before:
                return False
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self._write()
            except OSError:  # the run's own next write fails too, and tells the user
                continue

    def _write(self) -> None:
        with self.files.open_output_stream(self.path) as stream:
            stream.write(json.dumps({**_owner(), "token": self.token, "renewed": time.time()}).encode())

    def _read(self) -> dict[str, Any]:
        try:
            with self.files.open_input_stream(self.path) as stream:
                return _read_owner(bytes(stream.read()))
        except FileNotFoundError:
            return {}


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_of(os.getpid())}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and has ended. For an owner on another machine, False."""
    here = owner["host"] == socket.gethostname()
    return bool(here and _start_of(owner["pid"]) != owner["started"])


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's clock ticks; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _read_owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host", "started"} <= owner.keys() else {}


def _is_same_file(number: int, path: str) -> bool:
    try:
        there = Path(path).stat()
    except FileNotFoundError:
        return False
    own = os.fstat(number)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)
