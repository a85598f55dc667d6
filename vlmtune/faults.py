"""Messages for faults of the machine that end a run, such as a full disk."""

import errno
import re

DISK_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written to (permission denied)",
    errno.EPERM: "it may not be written to (operation not permitted)",
    errno.ENOENT: "it is gone",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EIO: "the disk has an input/output error",
    errno.ESTALE: "the network file system has lost it",
}
# The C library's messages, to recognize a fault in the text of another process's exception.
WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Input/output error": errno.EIO,
    "Stale file handle": errno.ESTALE,
    "Permission denied": errno.EACCES,
}


def disk_reason(error: BaseException | str) -> str | None:
    """Why a file could not be written, in a few words; None if the error has another reason.

    Args:
        error: an exception, or the text of a traceback.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number is None:
        named = next((code for words, code in WORDS.items() if words in text), None)
        found = re.search(r"(?:OSError|FileNotFoundError|NotADirectoryError): \[Errno (\d+)\]", text)
        number = named if named is not None else int(found.group(1)) if found else None
    return DISK_REASONS.get(number) if number is not None else None


def output_fault(folder: str, reason: str) -> str:
    """The message about an output folder that cannot be written to any more."""
    return (
        f"--output_dir {folder}: {reason}; what was written is kept. Mend it, then resume: "
        f"python ray_jobs/tune.py --resume {folder}"
    )
