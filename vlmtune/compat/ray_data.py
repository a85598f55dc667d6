"""Ray Data 2.60.0: a callback in each step of the executor's loop."""

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = ["ExecutionCallback", "set_execution_callback"]


def set_execution_callback(dataset: Any, callback: type[ExecutionCallback]) -> None:
    """Let an object of the class `callback` be called in each step of the executor that runs `dataset`.

    Experimental: `DataContext.custom_execution_callback_classes` takes subclasses of a class in the
    private `ray.data._internal`. Ray Data has no option for how often its executor's loop runs.
    """
    dataset.context.custom_execution_callback_classes = [callback]
