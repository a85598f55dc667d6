"""Saves and shows what Ray Tune's trials report, and says when the whole search has to stop."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from ray import tune

from vlmtune.faults import disk_reason
from vlmtune.packed.messages import FAILURE, NOTES, TRIAL_ID
from vlmtune.search.live_state import LiveState
from vlmtune.search.requests import UserRequests
from vlmtune.search.saved_trials import End, SavedTrial, SavedTrials
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_queue import TrialQueue
from vlmtune.search.trial_results import failure_reason, has_diverged

# Ray's words for an actor that died or does not answer, in the text that Tune keeps of its error.
PROCESS_DIED = re.compile(r"The actor (died|is dead)|ActorDiedError|ActorUnavailableError")


class SearchStopper(tune.Stopper):
    """Stops a trial that diverged, and all trials when the time is over or the disk fails.

    Args:
        metric: the search's metric.
        budget_s: seconds after which all trials are stopped; None for no limit.
        saved: the files of the trials; the search stops if one cannot be written.
        requests: says which trials a person wants to stop; None for the requests in the search's folder.

    Attributes:
        fault: why the search cannot continue, in a few words; None while it can.
    """

    def __init__(
        self, metric: str, budget_s: float | None, saved: SavedTrials, requests: UserRequests | None = None
    ) -> None:
        self.metric, self.budget_s, self.saved = metric, budget_s, saved
        self.requests = requests or UserRequests(saved.folder)
        self.fault: str | None = None
        self.started = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @property
    def budget_spent(self) -> bool:
        return self.budget_s is not None and time.monotonic() - self.started >= self.budget_s

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        saved_id = str(result.get("config", {}).get(TRIAL_ID))
        return has_diverged(result, self.metric) or self.requests.is_stopped(saved_id)

    def stop_all(self) -> bool:
        if self.fault is None and self.saved.error is not None:
            self.fault = disk_reason(self.saved.error) or str(self.saved.error)
        return self.fault is not None or self.budget_spent


class TrialRecorder(tune.Callback):
    """Writes what happens to the trials to their files, the console and the page of the search.

    Args:
        console: None shows nothing.
        stopped: ids of the trials that early stopping has stopped; the scheduler adds to it.
        live: the file that the page of the search reads; None writes none.
    """

    def __init__(
        self,
        queue: TrialQueue,
        saved: SavedTrials,
        console: TrialConsole | None,
        stopper: SearchStopper,
        stopped: set[str],
        live: LiveState | None = None,
    ) -> None:
        self.live = live
        self.queue, self.saved, self.console = queue, saved, console
        self.stopper, self.stopped = stopper, stopped

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._changed(self._saved_trial(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        saved = self._saved_trial(trial)
        saved.add_report(result)
        if self.console is not None:
            self.console.show_notes(result.get(NOTES, ()))
        if result.get("done"):
            self.saved.save(saved)  # on_trial_complete follows, and shows it
        else:
            self._changed(saved)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        saved = self._saved_trial(trial)
        saved.end = self._end(saved)
        self._changed(saved)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        saved = self._saved_trial(trial)
        text = Path(trial.error_file).read_text() if trial.error_file is not None else ""
        reason = failure_reason(text)
        fault = disk_reason(text)
        if fault is not None:
            self.stopper.fault = self.stopper.fault or fault
            return
        lost = PROCESS_DIED.search(text) is not None
        saved.end, saved.error = End.LOST if lost else End.ERROR, reason
        self._changed(saved)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        if self.live is not None:
            self.live.write(self.queue.trials.values(), at_once=True, running=False)

    def _saved_trial(self, trial: Any) -> SavedTrial:
        return self.queue.trials[trial.config[TRIAL_ID]]

    def _end(self, trial: SavedTrial) -> End | None:
        """How a trial ended that Ray Tune calls complete; None if it may continue in a resumed search."""
        last = trial.last_report
        if FAILURE in last or last.get("infeasible"):
            return End.LAST_REPORT
        if last and has_diverged(last, self.stopper.metric):
            return End.DIVERGED
        if last and last["step"] >= last["max_steps"]:
            return End.LAST_REPORT
        if trial.trial_id in self.stopped or self.stopper.requests.is_stopped(trial.trial_id):
            return End.STOPPED
        return End.BUDGET if self.stopper.budget_spent and self.stopper.fault is None else None

    def _changed(self, trial: SavedTrial) -> None:
        self.saved.save(trial)
        if self.console is not None:
            self.console.show(trial)
        if self.live is not None:
            self.live.write(self.queue.trials.values(), at_once=trial.end is not None)
