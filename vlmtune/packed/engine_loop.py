"""The training thread of an engine's actor. Between rounds it lets trials join and leave.

An engine is a frozen base on one GPU with the trials that train over it; a round is one batch of each of its
trials (see `engine`). A trial's process asks the actor for the trial's reports, one after another (it polls
them). The trial is paused while too many of them are unread (see `trial_registry`).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vlmtune.background import in_background
from vlmtune.packed.engine_gauges import EngineGauges
from vlmtune.packed.messages import NOTES, NoteLog, TrialReport
from vlmtune.packed.trial_registry import TrialPhase, TrialRegistry

if TYPE_CHECKING:
    from vlmtune.packed.engine import Engine

# Seconds that an engine without work waits before it checks its checkpoint writer for errors.
IDLE_CHECK_S = 1.0


class EngineLoop:
    """Trains the trials of a registry in an engine. Other threads change the registry under its lock.

    Args:
        early_stopping: whether the search may stop a trial after any of its reports.

    Attributes:
        training: the training thread; its exception is the error that ended training. None before `start`.
        changed: the condition on the registry's lock, see `TrialRegistry`.
        new_reports: whether any trial has reported since the last round began.
    """

    def __init__(
        self, registry: TrialRegistry, notes: NoteLog, gauges: EngineGauges, *, early_stopping: bool
    ) -> None:
        self.registry, self.notes, self.early_stopping = registry, notes, early_stopping
        self.gauges = gauges
        self.changed = registry.changed
        self.training: Future[None] | None = None
        self.new_reports = False

    @property
    def stopped(self) -> bool:
        return self.training is not None and self.training.done()

    def raise_error(self) -> None:
        """Raise the error that ended the thread, if it has ended."""
        if self.training is not None and self.training.done():
            self.training.result()

    def start(self, engine: Engine) -> None:
        self.training = in_background(partial(self._run, engine), "training")
        self.training.add_done_callback(lambda _: self._notify())

    def deliver(self, trial_id: str, report: TrialReport) -> None:
        """Add a report to its trial in the registry, with the console lines noted since the last report.

        The report of a trial that its process has meanwhile removed is dropped: nobody asks for it.
        """
        with self.changed:
            if self.registry.can_be_polled(trial_id):
                if notes := self.notes.take_unsent():
                    report = replace(report, metrics={**report.metrics, NOTES: notes})
                self.registry.get_polled(trial_id).reports.append(report)
                self.new_reports = True
            self.changed.notify_all()

    def mark_finished(self, trial_id: str) -> None:
        """Mark a trial that the engine has removed as FINISHED in the registry."""
        with self.changed:
            self.registry.mark_finished(trial_id)
            self.changed.notify_all()

    def _run(self, engine: Engine) -> None:
        while True:
            if self.early_stopping and self.new_reports:
                self._wait_for_search(engine)
            with self.changed:
                self.new_reports = False
                paused = self._apply_joins_and_leaves(engine)
                self.gauges.show_slots(len(engine.slots), self.registry.max_trials)
                if not engine.slots.keys() - paused:
                    with self.gauges.waiting_for("decisions" if engine.slots else "trials"):
                        self.changed.wait(timeout=IDLE_CHECK_S)
            # Without a trial, this still raises the error of a checkpoint that could not be written.
            engine.train_round(paused)

    def _wait_for_search(self, engine: Engine) -> None:
        """Wait until the search has decided about the trials that have reported.

        If it stops a trial, training the trial's next rows would be wasted. The wait is at most half the time
        that training these rows would take.
        """

        def undecided() -> int:
            return sum(trial.awaits_decision for trial in self.registry.in_phase(TrialPhase.TRAINING))

        with self.changed:
            limit = engine.round_seconds * undecided() / max(len(engine.slots), 1) / 2
            with self.gauges.waiting_for("decisions"):
                self.changed.wait_for(lambda: not undecided(), timeout=limit)

    def _apply_joins_and_leaves(self, engine: Engine) -> set[str]:
        """Let trials leave and join; returns the ids of paused trials, whose reports are yet to be read.

        A trial leaves because its process has asked for it, or is abandoned: its process is gone.
        """
        abandoned = [trial for trial in self.registry.in_phase(TrialPhase.TRAINING) if trial.is_abandoned]
        for trial in [*self.registry.in_phase(TrialPhase.LEAVING), *abandoned]:
            engine.leave(trial.trial_id)
            self.registry.remove(trial.trial_id)
        for trial in self.registry.in_phase(TrialPhase.READY):
            engine.join(trial.start_training())
        self.changed.notify_all()
        return {trial.trial_id for trial in self.registry.in_phase(TrialPhase.TRAINING) if trial.is_paused}

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()
