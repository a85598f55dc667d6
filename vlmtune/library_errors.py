"""Turn exceptions of other libraries, raised by a model's own code, into one plain line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlmtune.errors import ModelError

# Each model family has code of its own: a processor, a chat template, a model class. If it is used in a way
# that it was not written for, it raises one of these. Exhausted memory is handled separately: see
# `lacks_memory`.
LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
)
# Messages of torch when memory ran out, for which it has no exception class.
MEMORY_TEXTS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch means that the memory of the GPU or the machine ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in MEMORY_TEXTS)


@contextmanager
def plain_library_errors(model: str | None, what: str) -> Iterator[None]:
    """Turn the `LIBRARY_ERRORS` of the block into a `ModelError` of one line.

    Args:
        model: the model whose code runs in the block.
        what: what the block does, in words that "fails" can follow.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        if lacks_memory(error):
            raise
        raise ModelError(f"{model}: {what} fails ({type(error).__name__}: {first_line(error)})") from error
