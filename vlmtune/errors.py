"""What can go wrong because of what a user gave us, as exceptions that cross process boundaries.

Every message is one plain line that names the file, line, field or option at fault and, where one exists,
the way out. The entry
points print it on stderr and leave with exit code 2; any other exception is a fault of ours and leaves with
1.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


class UserError(Exception):
    """A mistake in what was given to vlmtune. Holds its message and nothing else, so that it pickles."""


class ConfigError(UserError):
    """An option, a configuration file or a search space that cannot be used."""


class DataError(UserError):
    """A data file, row or image that cannot be used."""


class ModelError(UserError):
    """A model, processor or adapter that cannot be loaded or does not fit."""


class ResourceError(UserError):
    """More GPUs, CPUs or memory asked for than there are."""


class DoesNotFitError(ResourceError):
    """A run that would not fit in the memory of its GPU. In a search that is a trial without a result, not
    the search's end."""


class DivergedError(UserError):
    """A run whose loss or gradient is no number any more."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A question with the known word that `word` may have been meant for, or nothing: the end of a
    message."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def plain_user_errors(way_on: str = "") -> Iterator[None]:
    """Around an entry point: a UserError becomes one line on stderr and exit code 2, Ctrl-C one line, with
    `way_on`, and 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted. {way_on}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
