"""The private folder and token of a Ray that vlmtune starts, which other users cannot read."""

import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmtune.errors import writable

logger = logging.getLogger(__name__)

# Longest RAY_TMPDIR in bytes: the path of a socket has at most 107 bytes, and Ray adds "/ray", a session's
# name, a process id and more.
MAX_TEMP_DIR = 36
SHORT_TEMP_DIR = "/tmp"
# Longest TMPDIR in bytes: Python's multiprocessing, which Ray's dashboard uses, makes sockets below it whose
# paths are 32 bytes longer.
MAX_TMPDIR = 70
TOKEN_BYTES = 32


def make_private_temp_dir() -> None:
    """Let Ray keep sockets, logs and object store files in a folder that only this user may enter.

    Ray makes its own folders writable for everybody. The private folder is below RAY_TMPDIR or TMPDIR, or
    below /tmp if these are too long for sockets, as in some batch systems.

    Raises:
        ResourceError: the folder cannot be made.
    """
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    name = f"ray-{os.geteuid()}"
    if _is_private(Path(folder)) and len(os.fsencode(folder)) <= MAX_TEMP_DIR:
        os.environ["RAY_TMPDIR"] = folder
        return
    if len(os.fsencode(folder)) + 1 + max(len(name), len("ray-8letters")) > MAX_TEMP_DIR:
        logger.info(f"Ray's sockets do not fit below {folder}: they are in {SHORT_TEMP_DIR}")
        folder = SHORT_TEMP_DIR
    with writable(folder, "RAY_TMPDIR"):
        own = Path(folder, name)
        try:
            own.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if not _is_private(own):  # another user made it, or let everybody in
                own = Path(tempfile.mkdtemp(prefix="ray-", dir=folder))
    os.environ["RAY_TMPDIR"] = str(own)


@contextmanager
def short_tmpdir() -> Iterator[None]:
    """Set TMPDIR, in the block that starts Ray, to a folder whose path is short enough for sockets."""
    given = os.environ.get("TMPDIR")
    if given is None or len(os.fsencode(given)) <= MAX_TMPDIR:
        yield
        return
    os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"]
    try:
        yield
    finally:
        os.environ["TMPDIR"] = given


def make_private_token() -> None:
    """Make the file of Ray's token, ~/.ray/auth_token, readable by this user only.

    Ray 2.60 requires a token by default, and would write the file with the default mode of new files. A token
    from the environment is kept. If the home folder cannot be written to, the token is in Ray's temporary
    folder.
    """
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    try:
        _write_token(Path.home() / ".ray" / "auth_token")
    except (OSError, RuntimeError):  # a home that cannot be written to, or none
        path = Path(os.environ["RAY_TMPDIR"], "auth_token")
        _write_token(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _write_token(path: Path) -> None:
    """Write a new token; if the file exists, only make it unreadable for other users."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
        return
    with os.fdopen(number, "w") as file:
        file.write(secrets.token_hex(TOKEN_BYTES))


def _is_private(folder: Path) -> bool:
    """Whether only this user may enter a folder."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return own and not stat.S_IMODE(found.st_mode) & 0o077
