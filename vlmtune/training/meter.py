"""`Meter`: measures the speed of a run, and logs its numbers to TensorBoard, trackers and the console."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from vlmtune.console import console_line
from vlmtune.evaluation.metrics import METRICS
from vlmtune.trackers.tracker import Tracker

EVALUATION_NUMBER = "evaluation"  # key of a report: the number of the evaluation, counted from 1
FIRST_LOSS = "first_loss"  # key of a report: the training loss of the run's first logged step


def evaluation_number(metrics: dict[str, Any], eval_steps: float | None) -> int:
    """The number of a report's evaluation among those of the whole run, counted from 1.

    Trials have made the same fraction of their steps at evaluations of the same number. Tune's own counter
    starts again at 1 when an interrupted trial resumes.

    Args:
        metrics: the report, with `epoch`, `step` and `max_steps`.
        eval_steps: the option `eval_steps`; None if every epoch is evaluated.
    """
    if eval_steps is None:
        return max(1, round(float(metrics["epoch"])))
    done: float = metrics["step"] / eval_steps
    return max(1, int((done if eval_steps >= 1 else done / metrics["max_steps"]) + 1e-9))


def first_loss(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{FIRST_LOSS: the loss of a run's first logged step}, from the trainer's log; empty before that step.

    With it, an adapter that became worse than the base can be recognized.
    """
    lines = (line.get(FIRST_LOSS, line.get("loss")) for line in log_history)
    return next(({FIRST_LOSS: float(loss)} for loss in lines if loss is not None), {})


class Meter:
    """Counts rows, tokens and seconds of training, and the seconds spent waiting for data.

    Args:
        runs_dir: folder of the TensorBoard events; None writes none.
        on_log: called with the numbers of each log entry, and with {"note": text}.
        clock: returns seconds; not of the wall clock if several runs share a device.
        trackers: services that get the same numbers as TensorBoard.

    Attributes:
        flops_per_token: floating-point operations of training on one token, for MFU (model FLOPs
            utilization). Set it once the model is loaded.
        data_wait_s: seconds of training spent waiting for rows.
    """

    def __init__(
        self,
        runs_dir: str | None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.clock, self.trackers = clock, trackers
        self.flops_per_token = 0.0
        self.on_log = on_log
        self.events = event_file(runs_dir) if runs_dir is not None else None
        self.started = clock()
        self.begun = False
        self.paused = self.data_wait_s = 0.0
        self.rows = self.tokens = 0
        self.last: dict[str, float] = {}

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches, and count the time until each one is read as waiting."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.data_wait_s += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def begin(self) -> None:
        """Start to measure at the first call, when the model is loaded and the first batch is read."""
        if not self.begun:
            self.begun, self.started, self.data_wait_s = True, self.clock() - self.paused, 0.0

    def count(self, *, rows: int, tokens: int) -> None:
        """Add rows that were trained on."""
        self.rows += rows
        self.tokens += tokens

    def note(self, text: str) -> None:
        """Send a line to the console, by `on_log`."""
        if self.on_log is not None:
            self.on_log({"note": text})

    def pause(self, seconds: float) -> None:
        """Exclude the seconds of an evaluation from the training time."""
        self.paused += seconds

    def log(self, logs: dict[str, float], step: int, max_steps: int) -> None:
        """Write the numbers of a step or an evaluation to TensorBoard, the trackers and `on_log`."""
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if "loss" in numbers and self.rows:
            rates = self.rates()
            numbers |= {name: rate for name, rate in rates.items() if name != "seconds"}
        self.last |= numbers
        if self.events is not None:
            for name, value in numbers.items():
                summary = scalar(curve(name), value)
                self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        for tracker in self.trackers:
            tracker.log({curve(name): value for name, value in numbers.items()}, step)
            if (trouble := tracker.take_trouble()) is not None:
                self.note(console_line("Tracker", trouble))
        if self.on_log is not None:
            self.on_log({**numbers, "step": step, "max_steps": max_steps})

    def rates(self) -> dict[str, float]:
        """Seconds of training so far, rates and peak memory, all of this worker."""
        seconds = max(self.clock() - self.started - self.paused, 1e-9)
        rates = {
            "seconds": seconds,
            "rows_per_second": self.rows / seconds,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.flops_per_token and (rate := matrix_rate()):
            rates["mfu"] = rates["tokens_per_second"] * self.flops_per_token / rate
        return rates | {
            "data_wait_fraction": min(self.data_wait_s / seconds, 1.0),
            "peak_memory": peak_memory(),
        }

    def summary(self) -> dict[str, float]:
        """The numbers that are reported together with an evaluation."""
        numbers = self.rates()
        if "loss" in self.last:
            numbers["train_loss"] = self.last["loss"]
        if self.events is not None:
            self.events.flush()
        return numbers

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        for tracker in self.trackers:
            tracker.close()


def curve(name: str) -> str:
    """The name of a number's curve in TensorBoard."""
    if name in METRICS:
        return f"eval_{name}"
    return name if name.startswith("eval_") else f"train/{name}"


def event_file(folder: str) -> EventsWriter:
    """A TensorBoard event file of this process in a local folder.

    SummaryWriter is not used, because it writes in a thread that `flush` does not wait for, and a stopped
    trial ends without a call of `close`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return EventsWriter(f"{folder}/events", filename_suffix=f".{os.getpid()}")


# Dense bfloat16 operations per second, by a word of the GPU's name, from the manufacturers' data sheets.
MATRIX_RATES = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def matrix_rate() -> float | None:
    """The rate in `MATRIX_RATES` of this process's GPU; None without a GPU, or for another GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((rate for word, rate in MATRIX_RATES.items() if word in words), None)


def training_flops_per_token(decoder: torch.nn.Module) -> float:
    """Floating-point operations of training on one token.

    Each frozen weight takes two operations in the forward pass, and two for the gradient of its input. It has
    no gradient itself.
    """
    weights = sum(
        layer.in_features * layer.out_features
        for layer in decoder.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    return 4.0 * weights


def peak_memory() -> float:
    """Peak memory in GB (2**30 bytes): of the GPU if one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
