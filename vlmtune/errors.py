"""A user's mistakes as exceptions that cross process boundaries.

Every message is one plain line that names the file, row, field or flag at fault and, if there is one, the way
out. The commands print it on stderr and exit with code 2. Any other exception is a fault of vlmtune or of its
machine: the exit code is then 1.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


class UserError(Exception):
    """A mistake in what the user asked for. It holds its message and nothing else, so that it pickles."""


class ConfigError(UserError):
    """A flag, a configuration file or a search space that cannot be used."""


class DataError(UserError):
    """A data file, row or image that cannot be used."""


class ModelError(UserError):
    """A model, processor or adapter that cannot be loaded or does not fit."""


class ResourceError(UserError):
    """More GPUs, CPUs or memory are needed than there are."""


class DoesNotFitError(ResourceError):
    """A run needs more memory than its GPU has. In a search, such a trial becomes INFEASIBLE."""


class DivergedError(UserError):
    """The loss or gradient of a run became NaN or infinite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean X?" with the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def plain_user_errors(resume_hint: str = "") -> Iterator[None]:
    """Wrap a command: a UserError is one line on stderr and exit code 2, Ctrl-C is exit code 130.

    Args:
        resume_hint: a sentence on how to resume, printed after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted. {resume_hint}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
