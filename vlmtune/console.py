"""What a person sees while a run goes on: few plain lines, and a live table where the terminal can show
one."""

import atexit
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

# Ray's note that more Python processes run than CPUs: so it is meant, most of them wait.
NOTED_BY_RAY = "PYTHON worker processes have been started"
SECONDS_BETWEEN_LINES = 5.0  # of a run's steps, where they are printed line by line


def quiet() -> None:
    """Keep the libraries' own chatter out of the console; call it before they are imported. It stays in
    Ray's log files."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NOTED_BY_RAY)
    for name in ("ray", "ray.data", "optuna", "transformers", "datasets", "accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.tune", "ray.train", "bitsandbytes"):  # a trial's failure is reported by us, in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Drop what this process, its C++ parts too, writes on stderr in the block; exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def say(text: str) -> None:
    """One line, at once: output goes through pipes and job logs."""
    print(text, flush=True)


def show(value: Any) -> str:
    """A value as short as it can be read."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"
    return ",".join(map(show, value)) if isinstance(value, list) else str(value)


class StepPrinter:
    """Prints logged steps of one run: every evaluation, and training steps at most every few seconds."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, logs: dict[str, Any]) -> None:
        if "note" in logs:
            say(logs["note"])
            return
        step = f"step {int(logs['step'])}/{int(logs['max_steps'])}"
        if "eval_loss" in logs:
            say(f"{step}  eval_loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            rate = f"  {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
            say(f"{step}  loss {logs['loss']:.4f}  learning_rate {logs['learning_rate']:.3g}{rate}")


class TrialTable:
    """The trials of a search by their number: one live table in a terminal, a line per change elsewhere."""

    def __init__(
        self, names: list[str], metric: str, mode: str = "min", console: Console | None = None
    ) -> None:
        self.names, self.metric, self.sign = names, metric, 1 if mode == "min" else -1
        self.rows: dict[int, dict[str, Any]] = {}
        self.console = console or Console()
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        if self.live is not None:
            self.live.start()
            atexit.register(
                self.close
            )  # an exception that Tune lets through would leave the terminal without a cursor

    def update(self, number: int, *, state: str, **values: Any) -> None:
        """Set what is known of a trial: its state, values, step, max_steps, the metric, seconds, error."""
        row = self.rows.setdefault(number, {})
        started = not row
        row |= {"state": state, **values}
        if self.live is not None:
            self.live.update(self.table(self.console.height - 3))
        else:
            say(self.line(number, values=started))

    def line(self, number: int, *, values: bool) -> str:
        """What is known of a trial in one line, with its values or without."""
        row = self.rows[number]
        parts = [f"trial {number:>3}  {row['state']:<10}"]
        if values:
            parts += [f"{name} {show(row[name])}" for name in self.names if name in row]
        if "step" in row:
            parts += [f"step {row['step']}/{row['max_steps']}", f"{self.metric} {show(row[self.metric])}"]
        if "error" in row:
            parts.append(row["error"])
        return "  ".join([*parts, *(["best so far"] if number == self.best() else [])]).rstrip()

    def best(self) -> int | None:
        """The number of the best trial that ran to its end so far, the first of equals."""
        ended = {number: row[self.metric] for number, row in self.rows.items() if row["state"] == "complete"}
        finite = [number for number, value in sorted(ended.items()) if math.isfinite(value)]
        return min(finite, key=lambda number: self.sign * ended[number], default=None)

    def table(self, height: int | None = None) -> Group:
        """The table with a row per trial; of more than `height` lines, the last ones and the best."""
        table = Table(
            box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False
        )  # four options and these fit into 80 columns
        for name in ("trial", "state", *self.names, "step", self.metric, "sec"):
            table.add_column(
                name, justify="left" if name == "state" else "right", overflow="fold", no_wrap=name == "state"
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
            cells = [show(row.get(name, "")) for name in (*self.names, "step", self.metric, "seconds")]
            cells[len(self.names)] = step
            mark, style = ("* ", "bold green") if number == best else ("", "")
            table.add_row(f"{mark}{number}", row["state"], *cells, style=style)
        return Group(
            table,
            *(
                Text(f"trial {number}: {self.rows[number]['error']}", overflow="ellipsis", no_wrap=True)
                for number in failed
            ),
        )

    def close(self) -> None:
        """Leave the whole table on the terminal."""
        if self.live is not None:
            self.live.update(self.table())
            self.live.stop()
            self.live = None
