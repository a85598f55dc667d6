"""What other libraries raise where a model's own code cannot do what is asked of it, as one plain line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlmtune.errors import ModelError

# Each family brings its own code: a processor, a chat template, a model class. What it raises on something
# that it was not written for is of these kinds. Exhausted memory is not among them: see `lacks_memory`.
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
# torch has no class of its own for these.
MEMORY_TEXTS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch means that the memory of the GPU or the machine ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in MEMORY_TEXTS)


@contextmanager
def plain_library_errors(model: str | None, what: str) -> Iterator[None]:
    """Turns the `LIBRARY_ERRORS` of a block into a `ModelError` of one line.

    Args:
        model: the model whose code runs in the block.
        what: what the block does, as the subject of "fails".
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        if lacks_memory(error):
            raise
        raise ModelError(f"{model}: {what} fails ({type(error).__name__}: {first_line(error)})") from error
