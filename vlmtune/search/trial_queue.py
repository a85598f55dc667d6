"""Gives Ray Tune the trials of a search: first those that an interruption left unfinished, then new ones."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from ray.tune.search import Searcher

from vlmtune.packed.messages import TRIAL_ID, VALUES
from vlmtune.search.first_points import GRID
from vlmtune.search.isolated_trial import ORIGIN
from vlmtune.search.saved_trials import SavedTrial


class Proposer(Protocol):
    """What proposes the values of trials, and learns how they ended."""

    def propose(self, number: int, trial_id: str) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
        """A new trial: its values by flag name, its parameters as Optuna stores them, and its origin."""

    def replay(self, trials: Sequence[SavedTrial]) -> None:
        """Learn of the trials of an interrupted search, in the order of their numbers."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn of a report of a trial that continues."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn of the end of a trial and of its last report."""


class GridPoints:
    """Proposes the points of a grid in their order."""

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        self.points = points

    def propose(self, number: int, trial_id: str) -> tuple[dict[str, Any], None, str]:
        return self.points[number], None, GRID

    def replay(self, trials: Sequence[SavedTrial]) -> None: ...

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None: ...

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None: ...


class TrialQueue(Searcher):
    """The search algorithm that Ray Tune asks for trials, in every search.

    A trial has one id of its own for good. Ray Tune gives it another id each time that it runs, for example
    in a resumed search.

    Args:
        proposer: proposes new trials. The queue tells it about `trials`.
        trials: the trials that exist already, ended or not, in the order of their numbers.
        total: number of trials of the whole search.

    Attributes:
        trials: all trials, by their own id.
    """

    def __init__(self, proposer: Proposer, trials: Sequence[SavedTrial], total: int) -> None:
        super().__init__()
        self.proposer = proposer
        self.trials = {trial.trial_id: trial for trial in trials}
        self._unfinished = [trial for trial in trials if trial.end is None]
        known = {trial.number for trial in trials}
        # Numbers that no trial has yet, or whose trial's files are lost.
        self._new_numbers = [number for number in range(total) if number not in known]
        self._own_ids: dict[str, str] = {}  # a trial's own id, by the id that Ray Tune gave it
        if trials and 0 not in known:  # the first trial that Optuna is asked for is the baseline
            self._unfinished.insert(0, self._propose(self._new_numbers.pop(0)))
        proposer.replay(trials)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its search algorithm, but nobody reads that

    @property
    def left(self) -> int:
        """Number of trials that Ray Tune has not asked for yet."""
        return len(self._unfinished) + len(self._new_numbers)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        trial = self._next()
        if trial is None:
            return None  # not reached: Ray Tune is told to run `left` trials
        self._own_ids[trial_id] = trial.trial_id
        return {VALUES: trial.values, ORIGIN: trial.origin, TRIAL_ID: trial.trial_id}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.proposer.on_trial_result(self._own_ids[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.proposer.on_trial_complete(self._own_ids[trial_id], result, error)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the trials have files of their own."""

    def restore(self, checkpoint_path: str) -> None: ...

    def _next(self) -> SavedTrial | None:
        if self._unfinished:
            return self._unfinished.pop(0)
        if not self._new_numbers:
            return None
        return self._propose(self._new_numbers.pop(0))

    def _propose(self, number: int) -> SavedTrial:
        own_id = uuid.uuid4().hex[:8]
        values, parameters, origin = self.proposer.propose(number, own_id)
        trial = self.trials[own_id] = SavedTrial(number, own_id, values, parameters, origin)
        return trial
