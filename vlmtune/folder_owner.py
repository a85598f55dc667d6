"""Refuse to read settings from a folder of another user, because settings can name code to run."""

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from vlmtune.errors import ConfigError
from vlmtune.storage import absolute, scheme

ROOT = 0  # may change every file of the machine anyway


def check_owner(folder: str, flag: str, names: Sequence[str] = (), *, trusted: bool = False) -> None:
    """Refuse a local folder that another user owns, or in which another user owns one of the files.

    A URI is always accepted, because it has no owner that could be compared.

    Args:
        folder: path or URI.
        flag: the option that names the folder, for messages.
        names: files in the folder that are read as settings or state; some may be missing.
        trusted: `--trust_folder` was given.

    Raises:
        ConfigError: neither this user nor root owns the folder or one of the files.
    """
    if trusted or scheme(folder) not in ("", "file"):
        return
    inner = Path(absolute(folder))
    for path in (inner, *(inner / name for name in names)):
        owner = _owner_of(path)
        if owner not in (None, ROOT, os.geteuid()):
            assert owner is not None
            what = f"{flag} {folder}: " + ("" if path == inner else f"{path.relative_to(inner)} ")
            raise ConfigError(
                f"{what}belongs to another user ({_name_of(owner)}), and its settings could make this "
                "command run code; if you trust whoever can write there, give --trust_folder too"
            )


def _owner_of(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:  # reading it says what is wrong
        return None


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
