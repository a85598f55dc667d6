"""An engine as a Ray actor, one on each GPU. Trials call it, and its own thread trains.

A call may come twice: Ray repeats it, or the trial's process was started again. So a trial that joins again
is left as it is, and reports are asked for by number. After an engine's process died, Ray starts the actor
again, without trials. The trials join again from their checkpoints.

Every process with a handle of the actor imports this module, and a trial's process must not import torch. So
modules that need torch are imported inside methods.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray

from vlmtune.console import console_line
from vlmtune.errors import UserError
from vlmtune.packed.engine_gauges import EngineGauges
from vlmtune.packed.engine_loop import EngineLoop
from vlmtune.packed.messages import Availability, NoteLog, TrialReport, TrialRequest
from vlmtune.packed.trial_registry import RegisteredTrial, TrialRegistry

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings
    from vlmtune.data.store import Store
    from vlmtune.packed.engine import Engine


class EngineActor:
    """The remote methods that trials call. The base is loaded at the first call that needs it.

    The class is long because a Ray actor has all its remote methods in one class.

    Args:
        settings, store, max_lora_rank, most_demanding: as for `Engine`.
        max_trials: the number of trials to train at once.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        max_trials: int,
        max_lora_rank: int,
        most_demanding: Settings | None = None,
    ) -> None:
        self.settings, self.store, self.max_lora_rank, self.most_demanding = (
            settings,
            store,
            max_lora_rank,
            most_demanding,
        )
        self.registry = TrialRegistry(max_trials)
        self.changed = self.registry.changed  # the condition on the registry's lock, see `TrialRegistry`
        self.notes = NoteLog()
        early_stopping = settings.search.early_stopping != "none"
        actor_id = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        gauges = EngineGauges(actor_id or "here")
        self.loop = EngineLoop(self.registry, self.notes, gauges, early_stopping=early_stopping)
        self.engine: Engine | None = None
        self.start_error: UserError | None = None

    def start(self) -> None:
        """Load the base and start the thread that trains.

        Raises:
            UserError: the base cannot be loaded, or does not fit.
        """
        from vlmtune.packed.engine import Engine

        with self.changed:
            if self.engine is not None:
                return
            try:
                self.engine = Engine(
                    self.settings,
                    self.store,
                    trials=self.registry.max_trials,
                    max_lora_rank=self.max_lora_rank,
                    deliver=self.loop.deliver,
                    note=self.notes.add,
                    on_end=self.loop.mark_finished,
                    most_demanding=self.most_demanding,
                )
            except UserError as error:
                # An engine that failed to start has no trials, so trials would keep choosing it.
                # `check_availability` raises this error to them.
                self.start_error = error
                raise
            self.start_error = None
            self.registry.max_trials = self.engine.max_trials
            self.loop.start(self.engine)

    def take_notes(self) -> list[str]:
        """The console lines that were not sent yet. Reports also carry such lines, as `NOTES`."""
        with self.changed:
            return self.notes.take_unsent()

    def finish_trackers(self) -> None:
        """End the trials' runs in the services of `report_to`, before the actor is killed."""
        from vlmtune.trackers.tracker import finish_trackers

        finish_trackers()

    def check_availability(self, trial_id: str, wait_s: float = 0.0) -> Availability:
        """Whether the engine has the trial, and how many slots are free; waits up to `wait_s` for one.

        Raises:
            Exception: the error that ended the training thread, or kept it from starting.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self._has(trial_id) or self.registry.free_slots > 0 or self.loop.stopped,
                timeout=wait_s,
            )
            self.loop.raise_error()
            if self.start_error is not None:
                raise self.start_error
            return Availability(self._has(trial_id), self.registry.free_slots)

    def join(self, request: TrialRequest) -> bool:
        """Let a trial join, from its last checkpoint if there is one.

        Does nothing if the trial is here already.

        Returns:
            Whether there was a free slot. Other trials may have taken the one that `check_availability` saw.

        Raises:
            UserError: the trial's settings cannot be trained.
        """
        self.start()
        trial_id = request.trial_id
        with self.changed:
            self.changed.wait_for(lambda: not self.registry.is_leaving(trial_id) or self.loop.stopped)
            if self.registry.can_be_polled(trial_id):
                return True
            self.loop.raise_error()
            trial = self.registry.reserve_slot(trial_id)
        if trial is None:
            return False
        try:
            self._prepare(trial, request)
        finally:
            with self.changed:
                self.registry.cancel(trial)  # does nothing after success
                self.changed.notify_all()
        return True

    def wait_for_report(self, trial_id: str, number: int, wait_s: float) -> TrialReport | None:
        """Wait up to `wait_s` for the trial's report of this number, counted from 0 since it joined.

        Returns:
            The report; None if it did not come in time.

        Raises:
            UnknownTrialError: the trial has to join again.
        """
        with self.changed:
            trial = self.registry.get_polled(trial_id)
            trial.next_report, trial.last_polled = number, time.monotonic()
            self.changed.notify_all()  # the trial or the next round may have waited for this call
            self.changed.wait_for(lambda: len(trial.reports) > number or self.loop.stopped, timeout=wait_s)
            trial.last_polled = time.monotonic()
            self.loop.raise_error()
            return trial.reports[number] if len(trial.reports) > number else None

    def leave(self, trial_id: str) -> None:
        """Remove a trial and drop its reports."""
        with self.changed:
            slot = self.registry.leave(trial_id)
            if slot is not None:
                slot.close()
            self.changed.notify_all()

    def _prepare(self, trial: RegisteredTrial, request: TrialRequest) -> None:
        """Make a trial's slot. If the trial has ended already, restore its final report instead."""
        from vlmtune.packed.checkpoint_folder import fetch_last_checkpoint, read_last_report
        from vlmtune.training.best_evaluation import ran_to_its_end
        from vlmtune.training.gauges import Gauges

        assert self.engine is not None
        self.engine.checkpoints.wait_for(request.trial_id)
        last = read_last_report(request.folder, self._note)
        if last is not None and ran_to_its_end(last):
            with self.changed:
                self.registry.restore_finished(trial, TrialReport(last, final=True))
            return
        with fetch_last_checkpoint(request.folder) as checkpoint:
            slot = self.engine.slot_factory.make(
                request.trial_id,
                request.settings,
                folder=request.folder,
                runs_dir=request.runs_dir,
                checkpoint=checkpoint,
                on_log=Gauges(request.trial_id, 0, request.on_log or self._note_log),
            )
        with self.changed:
            if not self.registry.set_ready(trial, slot):
                slot.close()

    def _note(self, line: str) -> None:
        with self.changed:
            self.notes.add(console_line("", line))

    def _note_log(self, numbers: dict[str, Any]) -> None:
        if "note" in numbers:
            with self.changed:
                self.notes.add(numbers["note"])

    def _has(self, trial_id: str) -> bool:
        return self.registry.get(trial_id) is not None and not self.registry.is_leaving(trial_id)
