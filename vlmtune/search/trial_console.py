"""The trials of a running search on the console."""

import logging
import time
from collections.abc import Sequence

from vlmtune.console import SECONDS_BETWEEN_LINES, TrialTable, console_line, format_value
from vlmtune.packed.messages import FAILURE, REASON
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.search.search_progress import SearchProgress
from vlmtune.search.trial_results import state_of

logger = logging.getLogger(__name__)


class TrialConsole:
    """Passes the state of the trials to a `TrialTable`, and says how far the search is.

    It shows nothing if vlmtune's log lines are not shown.

    Args:
        names: flag names of the searched options.
        progress: estimates the time that is left.
        device: what the trials train on, in words.
    """

    def __init__(
        self, names: list[str], metric: str, mode: str, progress: SearchProgress, device: str
    ) -> None:
        self.names, self.metric, self.mode = names, metric, mode
        self.progress, self.device = progress, device
        self.cost_is_printed = False
        self.last_line_at = 0.0  # time.monotonic() when the progress was last printed
        self.table: TrialTable | None = None

    def open(self, earlier: Sequence[SavedTrial]) -> None:
        """Show the table, with the trials that had ended when the search was interrupted."""
        if self.table is None and logger.isEnabledFor(logging.INFO):
            self.table = TrialTable(self.names, self.metric, self.mode)
            for trial in earlier:
                self._update(trial)

    def show_notes(self, lines: Sequence[str]) -> None:
        """Show the notes of an engine."""
        for line in lines:
            logger.info(line)

    def show(self, trial: SavedTrial) -> None:
        """Show a trial as it is now, running or ended."""
        if self.table is None:
            return
        self._update(trial)
        self.progress.start(self.table.rows.values())
        if trial.reports or trial.end is not None:
            self._print_progress(self.table, at_once=trial.end is not None)

    def close(self) -> None:
        """Leave the whole table on the terminal."""
        if self.table is not None:
            self.table.close()

    def _print_progress(self, table: TrialTable, *, at_once: bool) -> None:
        """Print how far the search is, and its cost as soon as there is an estimate.

        Args:
            at_once: print even if the last line is a moment ago.
        """
        rows = table.rows
        if not self.cost_is_printed and (cost := self.progress.cost(rows.values(), self.device)):
            self.cost_is_printed = True
            logger.info(console_line("Cost", cost))
        if at_once or time.monotonic() - self.last_line_at >= SECONDS_BETWEEN_LINES:
            self.last_line_at = time.monotonic()
            best = table.best()
            value = None if best is None else format_value(rows[best][self.metric])
            table.progress(self.progress.line(rows.values(), value))

    def _update(self, trial: SavedTrial) -> None:
        assert self.table is not None
        last = trial.last_report
        cells = dict(trial.values)
        if "step" in last:
            cells |= {name: last[name] for name in ("step", "max_steps", self.metric)}
            cells["seconds"] = round(last.get("time_total_s", last.get("seconds", 0)))
        error = trial.error or last.get(FAILURE) or last.get(REASON)
        if trial.end is End.DIVERGED:
            error = "diverged: give a smaller learning_rate"
        if error:
            cells["error"] = error
        state = "running" if trial.end is None else state_of(trial).lower()
        self.table.update(trial.number + 1, state=state, **cells)
