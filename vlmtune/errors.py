"""A user's mistakes as exceptions that cross process boundaries.

Every message is one plain line that names the file, row, field or flag at fault and, if there is one, the way
out. The commands print it on stderr and exit with code 2. Any other exception is a fault of vlmtune or of its
machine: the exit code is then 1.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vlmtune.shown_text import printable, redacted
from vlmtune.stop_signals import INTERRUPTED, TERMINATED, exit_code, handle_stop_signals

FAULT, USER_ERROR = 1, 2  # exit codes of commands


class UserError(Exception):
    """A mistake in what the user asked for. It holds its message and nothing else, so that it pickles."""


class ConfigError(UserError):
    """A flag, a configuration file or a search space that cannot be used."""


class DataError(UserError):
    """A data file, row or image that cannot be used."""


class ModelError(UserError):
    """A model, processor or adapter that cannot be loaded or does not fit."""


class ResourceError(UserError):
    """More GPUs, CPUs, memory or disk space are needed than there are."""


class DoesNotFitError(ResourceError):
    """A run needs more memory than its GPU has. In a search, such a trial becomes INFEASIBLE."""


class DivergedError(UserError):
    """The loss or gradient of a run became NaN or infinite."""


class SearchFailedError(Exception):
    """A search in which no trial completed. It can be resumed."""


class RunStoppedError(Exception):
    """A fault of the machine ended a run, such as a full disk. Its message is one line with the way out."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a search, which can be resumed.

    Attributes:
        folder: absolute path or URI of its output folder.
        code: the exit code of a command.
    """

    def __init__(self, folder: str, code: int = INTERRUPTED) -> None:
        super().__init__(folder, code)
        self.folder, self.code = folder, code


def interrupted_search(folder: str, interrupt: KeyboardInterrupt) -> SearchInterrupted:
    """What `interrupt` is called where it ends the search in `folder`."""
    return SearchInterrupted(folder, exit_code(interrupt))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean X?" with the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def writable(folder: str, flag: str) -> Iterator[None]:
    """Writes below a folder: one that fails becomes a line that names the folder and its flag.

    Raises:
        ResourceError: no permission, no space, or no such place.
    """
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ResourceError(
            f"{flag} {folder}: cannot be written: {reason}; "
            f"give {flag} a folder with space that you may write to"
        ) from error


@contextmanager
def plain_user_errors(resume_hint: str = "") -> Iterator[None]:
    """Wrap a command: an expected error becomes a plain line on stderr and an exit code.

    A UserError exits with 2, a search without a completed trial and a fault of the machine with 1, Ctrl-C
    with 130, SIGTERM with 143. Any other exception is left to Python, which prints its traceback and exits
    with 1.

    Args:
        resume_hint: a sentence on how to resume, printed after Ctrl-C.
    """
    handle_stop_signals()
    try:
        yield
    except SearchInterrupted as interrupt:
        word = "Terminated" if interrupt.code == TERMINATED else "Interrupted"
        _exit(f"{word}. To resume: python ray_jobs/tune.py --resume {interrupt.folder}", interrupt.code)
    except KeyboardInterrupt as interrupt:
        code = exit_code(interrupt)
        word = "Terminated" if code == TERMINATED else "Interrupted"
        _exit(f"{word}. {resume_hint}".rstrip(), code)
    except (SearchFailedError, RunStoppedError) as error:
        _exit(f"error: {error}", FAULT)
    except UserError as error:
        _exit(f"error: {error}", USER_ERROR)


def _exit(text: str, code: int) -> None:
    print(printable(redacted(text)), file=sys.stderr)
    sys.exit(code)
