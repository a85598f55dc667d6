"""A user's mistakes as exceptions that cross process boundaries.

Every message is one plain line that names the file, row, field or flag at fault and, if there is one, the way
out. The commands print it on stderr and exit with code 2. Any other exception is a fault of vlmtune or of its
machine: the exit code is then 1.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vlmtune.shown_text import printable, redacted
from vlmtune.stop_signals import INTERRUPTED, TERMINATED, exit_code, handled_stop_signals

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


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a search or a training that can be resumed.

    Attributes:
        resume: the command that resumes it.
        code: the exit code of a command.
    """

    def __init__(self, resume: str, code: int = INTERRUPTED) -> None:
        super().__init__(resume, code)
        self.resume, self.code = resume, code


@contextmanager
def named_interrupt(resume: Callable[[], str | None]) -> Iterator[None]:
    """An interrupt of the block becomes a `RunInterrupted`, once `resume` has a command for that."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        command = resume()
        if command is None:
            raise
        raise RunInterrupted(command, exit_code(interrupt)) from None


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
