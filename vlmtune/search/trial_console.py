"""The trials of a running search on the console."""

import logging
import time
from pathlib import Path
from typing import Any

from ray import tune

from vlmtune.console import SECONDS_BETWEEN_LINES, TrialTable, console_line, format_value
from vlmtune.packed.messages import FAILURE, NOTES
from vlmtune.search.isolated_trial import trial_values
from vlmtune.search.search_progress import SearchProgress
from vlmtune.search.trial_results import FAILED, failure_reason, proposal_number, state_of
from vlmtune.training.best_evaluation import has_ended

logger = logging.getLogger(__name__)


class TrialConsole(tune.Callback):
    """Passes the state of the trials from Ray Tune to a `TrialTable`.

    It shows nothing if vlmtune's log lines are not shown. The table is made in `setup`, because Tune pickles
    its callbacks before.
    """

    def __init__(
        self, names: list[str], metric: str, mode: str, progress: SearchProgress, device: str
    ) -> None:
        self.names, self.metric, self.mode = names, metric, mode
        self.progress, self.device = progress, device
        self.cost_is_told = False
        self.last_line = 0.0  # when the progress was printed, in seconds
        self.table: TrialTable | None = None

    def setup(self, *_: Any, **__: Any) -> None:
        if logger.isEnabledFor(logging.INFO):
            self.table = TrialTable(self.names, self.metric, self.mode)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        for earlier in trials:  # trials that had ended when the search was interrupted
            if earlier.is_finished() and self.table and _number(earlier, trials) not in self.table.rows:
                self._update(trials, earlier)
        self._update(trials, trial, "running")
        if self.table:
            self.progress.start(self.table.rows.values())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        for note in result.get(NOTES, ()):
            logger.info(note)
        if "step" in result and not has_ended(result):
            self._update(trials, trial, "running", result)
            self._tell_progress(at_once=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._update(trials, trial, state_of(trial.last_result, failed=False).lower())
        self._tell_progress(at_once=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._update(trials, trial, FAILED.lower())
        self._tell_progress(at_once=True)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        if self.table:
            self.table.close()

    def _tell_progress(self, *, at_once: bool) -> None:
        """Print how far the search is, and its cost as soon as that can be told.

        Args:
            at_once: also if it was printed a moment ago.
        """
        if self.table is None:
            return
        rows = self.table.rows
        if not self.cost_is_told and (cost := self.progress.cost(rows.values(), self.device)):
            self.cost_is_told = True
            logger.info(console_line("Cost", cost))
        if at_once or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            best = self.table.best()
            value = None if best is None else format_value(rows[best][self.metric])
            self.table.progress(self.progress.line(rows.values(), value))

    def _update(
        self, trials: list[Any], trial: Any, state: str | None = None, result: dict[str, Any] | None = None
    ) -> None:
        if self.table is None:
            return
        result = result or trial.last_result or {}
        cells = trial_values(trial.config)
        if "step" in result:
            cells |= {name: result[name] for name in ("step", "max_steps", self.metric)}
            cells["seconds"] = round(result["time_total_s"])
        if trial.error_file is not None:
            cells["error"] = failure_reason(Path(trial.error_file).read_text())
        elif FAILURE in result:
            cells["error"] = result[FAILURE]
        ended = state_of(result, failed=trial.error_file is not None).lower()
        self.table.update(_number(trial, trials), state=state or ended, **cells)


def _number(trial: Any, trials: list[Any]) -> int:
    """A trial's number in the table, counted from 1 in the order of proposal."""
    own = proposal_number(trial.experiment_tag)
    return 1 + sum(proposal_number(other.experiment_tag) < own for other in trials)
