"""The console output of commands: lines with a label, the steps of a run, and the table of a search's trials.

Modules log through `logging.getLogger(__name__)`. `console_line` lays out a line, and `show_log` prints what
is logged. A program that uses vlmtune as a library can handle the logger `vlmtune` in its own way.
"""

import atexit
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vlmtune.progress import Estimate
from vlmtune.shown_text import printable, redacted

LABEL_WIDTH = 10  # columns for the label and the space after it; "Dashboard " is the longest
# Part of Ray's warning about more Python processes than CPUs. vlmtune starts more on purpose: most of them
# wait.
RAY_WORKER_WARNING = "PYTHON worker processes have been started"
SECONDS_BETWEEN_LINES = 5.0  # between two printed training steps of a run


def configure_console() -> None:
    """Print vlmtune's log lines and silence the libraries'. Commands call it before they import libraries.

    In a locale without Unicode (cron jobs, bare containers) most file names cannot be used. The program then
    starts again in Python's UTF-8 mode. Characters that the output's encoding does not have are printed as
    escapes.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_log()
    silence_libraries()


def show_log() -> None:
    """Print vlmtune's log records of level INFO or above on stdout. A second call changes nothing."""
    logger = logging.getLogger("vlmtune")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a handler of the root logger would print each line a second time


def silence_libraries() -> None:
    """Keep the libraries' warnings and progress out of the console; Ray's log files keep them."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_WORKER_WARNING)
    for name in ("ray", "ray.data", "optuna", "transformers", "datasets", "accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.tune", "ray.train", "bitsandbytes"):  # vlmtune reports a failed trial in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)


class ConsoleHandler(logging.Handler):
    """Prints log records as plain lines on the present `sys.stdout`, which a live table may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(text: str) -> None:
    """Print one line and flush, because output may go to a pipe or a job's log."""
    print(printable(redacted(text)), flush=True)


def console_line(label: str, text: str) -> str:
    """A line of two columns, `label` and `text`. A line that continues the one before has an empty label."""
    return f"{label:<{LABEL_WIDTH}}{text}"


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard everything that this process, C++ code included, writes to stderr in the block."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def format_value(value: Any) -> str:
    """A short text of a value: a float with three or four digits, a list with commas."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"
    return ",".join(map(format_value, value)) if isinstance(value, list) else str(value)


class StepPrinter:
    """Prints a run's progress: notes, every evaluation, and a training step at most every few seconds."""

    def __init__(self) -> None:
        self.last = 0.0  # when a training step was printed, in seconds
        self.estimate = Estimate()

    def __call__(self, logs: dict[str, Any]) -> None:
        if "note" in logs:
            say(logs["note"])
            return
        step = f"step {int(logs['step'])}/{int(logs['max_steps'])}"
        left = self.estimate.text(logs["step"], logs["max_steps"])
        left = f"  {left}" if left else ""
        if "eval_loss" in logs:
            say(f"{step}  eval_loss {logs['eval_loss']:.4f}{left}")
        elif "loss" in logs and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            rate = f"  {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
            say(f"{step}  loss {logs['loss']:.4f}  learning_rate {logs['learning_rate']:.3g}{rate}{left}")


class TrialTable:
    """Shows the trials of a search: a live table in a terminal, otherwise a line for each change.

    `rows` holds the values of each trial (state, step, metric, …) by the trial's number.
    """

    def __init__(
        self, names: list[str], metric: str, mode: str = "min", console: Console | None = None
    ) -> None:
        self.names, self.metric, self.sign = names, metric, 1 if mode == "min" else -1
        self.rows: dict[int, dict[str, Any]] = {}
        self.footer = ""  # the search's progress
        self.console = console or Console()
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        if self.live is not None:
            self.live.start()
            # Without this, an exception would leave the terminal without a cursor.
            atexit.register(self.close)

    def update(self, number: int, *, state: str, **values: Any) -> None:
        """Update a trial's row: its state, searched values, step, max_steps, the metric, seconds, error."""
        row = self.rows.setdefault(number, {})
        is_new = not row
        row |= {"state": state, **values}
        if self.live is not None:
            self.live.update(self.table(self.console.height - 3))
        else:
            say(self.line(number, with_values=is_new))

    def progress(self, text: str) -> None:
        """Show the search's progress: under the live table, otherwise as a line."""
        self.footer = text
        if self.live is not None:
            self.live.update(self.table(self.console.height - 4))
        else:
            say(text)

    def line(self, number: int, *, with_values: bool) -> str:
        """The line of a trial, with or without its searched values."""
        row = self.rows[number]
        parts = [f"trial {number:>3}  {row['state']:<10}"]
        if with_values:
            parts += [f"{name} {format_value(row[name])}" for name in self.names if name in row]
        if "step" in row:
            parts += [
                f"step {row['step']}/{row['max_steps']}",
                f"{self.metric} {format_value(row[self.metric])}",
            ]
        if "error" in row:
            parts.append(row["error"])
        return "  ".join([*parts, *(["best so far"] if number == self.best() else [])]).rstrip()

    def best(self) -> int | None:
        """The number of the best complete trial so far; of equally good ones, the first."""
        values = {number: row[self.metric] for number, row in self.rows.items() if row["state"] == "complete"}
        finite = [number for number, value in sorted(values.items()) if math.isfinite(value)]
        return min(finite, key=lambda number: self.sign * values[number], default=None)

    def table(self, height: int | None = None) -> Group:
        """The table with a row for each trial; of too many for `height` lines, the best and the last ones."""
        # With this padding, four searched values and the fixed columns fit into 80 columns.
        table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("trial", "state", *self.names, "step", self.metric, "sec"):
            table.add_column(
                Text(printable(name)),
                justify="left" if name == "state" else "right",
                overflow="fold",
                no_wrap=name == "state",
            )
        best, numbers = self.best(), sorted(self.rows)
        failed = [number for number in numbers if "error" in self.rows[number]]
        if height is not None:
            failed = failed[-3:]
            last = numbers[-max(height - len(failed), 1) :]
            numbers = last if best is None or best in last else [best, *last[1:]]
        for number in numbers:
            row = self.rows[number]
            step = f"{row['step']}/{row['max_steps']}" if "step" in row else ""
            values = [format_value(row.get(name, "")) for name in self.names]
            results = [format_value(row.get(name, "")) for name in (self.metric, "seconds")]
            mark, style = ("* ", "bold green") if number == best else ("", "")
            cells = (f"{mark}{number}", row["state"], *values, step, *results)
            table.add_row(*(Text(printable(cell)) for cell in cells), style=style)
        errors = (f"trial {number}: {self.rows[number]['error']}" for number in failed)
        footer = [Text(self.footer)] if self.footer else []
        return Group(table, *(Text(printable(error), overflow="fold") for error in errors), *footer)

    def close(self) -> None:
        """Stop the live display, and leave the whole table on the terminal."""
        if self.live is not None:
            self.live.update(self.table())
            self.live.stop()
            self.live = None
