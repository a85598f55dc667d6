"""The lock of an output folder: against living processes, not against dead ones."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from vlmtune import folder_lock
from vlmtune.errors import ConfigError
from vlmtune.folder_lock import LOCK_FILE, FolderLock

HOLDER = """
import sys
from vlmtune.folder_lock import FolderLock
FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_of_two_processes_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with holder(folder) as process:
        with pytest.raises(ConfigError) as caught:
            FolderLock(str(folder)).acquire()
        assert str(caught.value) == (
            f"--output_dir {folder}: process {process.pid} on {socket.gethostname()} is writing into it; "
            "wait for its end, or choose another folder"
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = FolderLock(str(folder))
        lock.acquire()
        lock.release()


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    lock = FolderLock(str(tmp_path / "a" / "b"))
    lock.acquire()
    assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "file").touch()
    lock = FolderLock(str(tmp_path / "results"))
    lock.acquire()
    lock.release()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--output_dir /proc/out: cannot be written to: ") as caught:
        FolderLock("/proc/out").acquire()
    assert "\n" not in str(caught.value)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that is locked as one in an object store is: nothing there ends with a process."""
    monkeypatch.setattr(folder_lock, "LEASE_S", 2.5)
    monkeypatch.setattr(folder_lock, "RENEW_S", 0.5)
    monkeypatch.setattr(folder_lock, "SETTLE_S", 0.1)
    inside = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(folder_lock.storage, "filesystem", lambda _: (inside, "out"))
    (tmp_path / "out").mkdir()
    return str(tmp_path / "out")


def write_lock(folder: str, **owner: object) -> None:
    Path(folder, LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "5", **owner}))


def test_in_an_object_store_a_lock_that_is_renewed_holds(store: str) -> None:
    first = FolderLock("s3://bucket/out")
    first.acquire()
    with pytest.raises(
        ConfigError, match=f"process {os.getpid()} on {socket.gethostname()} is writing into it"
    ):
        FolderLock("s3://bucket/out").acquire()
    first.release()
    assert not Path(store, LOCK_FILE).exists()
    second = FolderLock("s3://bucket/out")
    second.acquire()
    second.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}'])
def test_in_an_object_store_a_damaged_lock_holds_nobody(store: str, content: str) -> None:
    Path(store, LOCK_FILE).write_text(content)
    lock = FolderLock("s3://bucket/out")
    lock.acquire()
    lock.release()


def test_in_an_object_store_a_dead_owner_holds_nothing(store: str) -> None:
    write_lock(store, token="of a machine that is gone")
    lock = FolderLock("s3://bucket/out")
    lock.acquire()
    lock.release()
    write_lock(
        store, host=socket.gethostname(), pid=os.getpid(), started="of another process with this number"
    )
    lock = FolderLock("s3://bucket/out")
    lock.acquire()
    lock.release()
