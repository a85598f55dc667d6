"""The exceptions of vlmtune, which can be pickled, and how a command turns them into exit codes.

A `UserError` is a user's mistake. Its message is one plain line that names the file, row, field or flag at
fault and, if possible, what to do. Commands print it on stderr and exit with code 2. Any other exception is a
fault of vlmtune or of the machine, with exit code 1.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vlmtune.shown_text import printable, redacted
from vlmtune.stop_signals import INTERRUPTED, TERMINATED, exit_code, handled_stop_signals

FAULT, USER_ERROR = 1, 2  # exit codes of commands


class UserError(Exception):
    """A mistake of the user. It has its message as the only argument, so that it can be pickled."""


class ConfigError(UserError):
    """A flag, a configuration file or a search space that cannot be used."""


class DataError(UserError):
    """A data file, row or image that cannot be used."""


class ModelError(UserError):
    """A model, processor or adapter that cannot be loaded or does not fit."""


class ResourceError(UserError):
    """There are too few GPUs or CPUs, or too little memory or disk space."""


class DoesNotFitError(ResourceError):
    """A run needs more memory than its GPU has. In a search, such a trial becomes INFEASIBLE."""


class DivergedError(UserError):
    """The loss or gradient of a run became NaN or infinite."""


class SearchFailedError(Exception):
    """A search in which no trial completed. It can be resumed."""


class RunStoppedError(Exception):
    """A fault of the machine ended a run, such as a full disk. Its message is one line with the way out."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a search or a training that can be resumed.

    Attributes:
        resume: the command that resumes the run.
        code: the exit code.
    """

    def __init__(self, resume: str, code: int = INTERRUPTED) -> None:
        super().__init__(resume, code)
        self.resume, self.code = resume, code


@contextmanager
def named_interrupt(resume: Callable[[], str | None]) -> Iterator[None]:
    """Turn a KeyboardInterrupt of the block into a `RunInterrupted`, if `resume()` returns a command."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        command = resume()
        if command is None:
            raise
        raise RunInterrupted(command, exit_code(interrupt)) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean X?" with the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def writable(folder: str, flag: str) -> Iterator[None]:
    """Turn an OSError of the block, which writes below `folder`, into a line that names folder and flag.

    Raises:
        ResourceError: a write failed: no permission, no space, or no such folder.
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
    """Wrap a command: turn expected exceptions into a plain line on stderr and an exit code.

    The exit code is 2 for a UserError, 1 for SearchFailedError and RunStoppedError, 130 for Ctrl-C, and 143
    for SIGTERM. For any other exception, Python prints the traceback and exits with 1.

    Args:
        resume_hint: a sentence on how to resume, printed after Ctrl-C.
    """
    try:
        with handled_stop_signals():
            yield
    except KeyboardInterrupt as interrupt:
        code, hint = exit_code(interrupt), resume_hint
        if isinstance(interrupt, RunInterrupted):
            code, hint = interrupt.code, f"To resume: {interrupt.resume}"
        word = "Terminated" if code == TERMINATED else "Interrupted"
        _exit(f"{word}. {hint}".rstrip(), code)
    except (SearchFailedError, RunStoppedError) as error:
        _exit(f"error: {error}", FAULT)
    except UserError as error:
        _exit(f"error: {error}", USER_ERROR)


def _exit(text: str, code: int) -> None:
    print(printable(redacted(text)), file=sys.stderr)
    sys.exit(code)
