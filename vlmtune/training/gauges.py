"""Show the numbers of a training run on the Ray dashboard, as one gauge for each number."""

from collections.abc import Callable
from typing import Any

from ray.util.metrics import Gauge

DESCRIPTIONS = {  # by the number's name in the logs
    "loss": "Training loss of the last logged step",
    "eval_loss": "Evaluation loss per labelled token",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens trained on a second",
    "rows_per_second": "Rows trained on a second",
    "mfu": "Share of the GPU's bfloat16 matrix rate that training uses",
    "data_wait_fraction": "Share of the training time spent waiting for rows",
    "peak_memory": "Peak memory of the GPU, or of the process without one, in GB",
}


class Gauges:
    """Sets a gauge `vlmtune_...` for each number of a logged step, and passes the numbers on.

    Args:
        run, rank: the run's name and the worker's number, which are tags of the gauges.
        pass_on: called with the same numbers; None if nobody else needs them.
    """

    def __init__(self, run: str, rank: int, pass_on: Callable[[dict[str, Any]], None] | None) -> None:
        self.tags, self.pass_on = {"run": run, "worker": str(rank)}, pass_on
        self.gauges = {
            name: Gauge(f"vlmtune_{name}", description, tag_keys=tuple(self.tags))
            for name, description in DESCRIPTIONS.items()
        }

    def __call__(self, numbers: dict[str, Any]) -> None:
        for name, gauge in self.gauges.items():
            if name in numbers:
                gauge.set(numbers[name], tags=self.tags)
        if self.pass_on is not None:
            self.pass_on(numbers)
