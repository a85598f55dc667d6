"""What a person sees while a run goes on: few plain lines, and a live table where the terminal can show one."""

import logging
import os
import sys
import time
import warnings
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

# Ray's note that more Python processes run than CPUs: so it is meant, most of them wait.
NOTED_BY_RAY = "PYTHON worker processes have been started"
SECONDS_BETWEEN_LINES = 5.0  # of a run's steps, where they are printed line by line


def quiet() -> None:
    """Keep the libraries' own chatter out of the console; call it before they are imported. It stays in Ray's log files."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NOTED_BY_RAY)
    for name in ("ray", "ray.data", "optuna", "transformers", "datasets", "accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.tune", "ray.train", "bitsandbytes"):  # a trial's failure is reported by us, in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)


def say(text: str) -> None:
    """One line, at once: output goes through pipes and job logs."""
    print(text, flush=True)


def number(value: Any) -> str:
    """A value as short as it can be read."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


class StepPrinter:
    """Prints logged steps of one run: every evaluation, and training steps at most every few seconds."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, logs: dict[str, float]) -> None:
        step = f"step {int(logs['step'])}/{int(logs['max_steps'])}"
        if "eval_loss" in logs:
            say(f"{step}  eval_loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            say(f"{step}  loss {logs['loss']:.4f}  learning_rate {logs['learning_rate']:.3g}")


class TrialTable:
    """The trials of a search: one live table in a terminal, a line per change elsewhere."""

    def __init__(self, names: list[str], metric: str) -> None:
        self.names, self.metric = names, metric
        self.rows: dict[str, dict[str, Any]] = {}
        self.live = Live(console=Console(), refresh_per_second=2) if sys.stdout.isatty() else None
        if self.live is not None:
            self.live.start()

    def update(self, trial_id: str, **values: Any) -> None:
        """Set what is known of a trial: its values, state, step, max_steps, the metric, seconds."""
        row = self.rows.setdefault(trial_id, {"number": len(self.rows) + 1})
        row |= values
        if self.live is not None:
            self.live.update(self.table())
        else:
            say(self.line(row))

    def line(self, row: dict[str, Any]) -> str:
        values = "  ".join(f"{name} {number(row[name])}" for name in self.names if name in row)
        progress = f"  step {row['step']}/{row['max_steps']}  {self.metric} {number(row[self.metric])}" if "step" in row else ""
        error = f"  {row['error']}" if "error" in row else ""
        return f"trial {row['number']:>3}  {row['state']:<9}  {values}{progress}{error}"

    def table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for name in ("trial", "state", *self.names, "step", self.metric, "seconds"):
            table.add_column(name, justify="left" if name == "state" else "right")
        finished = [row[self.metric] for row in self.rows.values() if self.metric in row]
        for row in self.rows.values():
            step = f"{row['step']}/{row['max_steps']}" if "step" in row else ""
            best = "bold green" if row.get(self.metric) in finished[:0] + sorted(finished)[:1] else ""
            cells = [number(row.get(name, "")) for name in self.names]
            seconds = number(round(row["seconds"])) if "seconds" in row else ""
            table.add_row(str(row["number"]), row["state"], *cells, step, number(row.get(self.metric, "")), seconds, style=best)
        return table

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
