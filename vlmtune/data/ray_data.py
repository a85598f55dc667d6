"""Settings of Ray Data: rows stay in order, the console stays quiet, a UserError stays one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray.data
from ray.exceptions import RayTaskError

from vlmtune.errors import UserError


def configure_ray_data() -> None:
    """Keep the order of rows, and send progress bars and execution plans to Ray's log files."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # not wrapped, see `reraise_user_errors`
    # Ray Data logs the traceback of an error that it raises as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def reraise_user_errors() -> Iterator[None]:
    """Raise a UserError of a Ray Data task as the task raised it: one line, without what Ray adds to it."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from None
        raise
