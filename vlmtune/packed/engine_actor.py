"""An engine as a Ray actor, one on each GPU. Trials call it, and its own thread trains.

Calls may be repeated: by Ray, or by a trial's process that was started again. Joining is therefore idempotent
by the trial's id, and reports are asked for by number. An engine that died comes back without trials. They
join again from their checkpoints.

Every process that gets an engine's handle imports this module, each trial's process too. So only methods
import modules that need torch.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vlmtune.errors import UserError
from vlmtune.packed.engine_loop import EngineLoop
from vlmtune.packed.messages import NoteLog, TrialReport, TrialRequest, Vacancy
from vlmtune.packed.seats import Seat, Seats

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings
    from vlmtune.data.store import Store
    from vlmtune.packed.engine import Engine


class EngineActor:
    """What trials call. The base is loaded at the first call that needs it, also after a restart.

    Args:
        settings, store, rank, largest: as for `Engine`.
        trials: how many trials to train at once.
    """

    def __init__(
        self, settings: Settings, store: Store, trials: int, rank: int, largest: Settings | None = None
    ) -> None:
        self.settings, self.store, self.rank, self.largest = settings, store, rank, largest
        self.seats = Seats(trials)
        self.changed = self.seats.changed
        self.notes = NoteLog()
        early_stopping = settings.search.early_stopping != "none"
        self.loop = EngineLoop(self.seats, self.notes, early_stopping=early_stopping)
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
                    trials=self.seats.places,
                    rank=self.rank,
                    deliver=self.loop.deliver,
                    note=self.notes.add,
                    on_end=self.loop.end_seat,
                    largest=self.largest,
                )
            except UserError as error:
                # An engine that failed to start has no trials, so trials would keep choosing it.
                # `find_place` raises this error to them.
                self.start_error = error
                raise
            self.start_error = None
            self.seats.places = self.engine.max_trials
            self.loop.start(self.engine)

    def take_notes(self) -> list[str]:
        """The console lines that were not sent yet. Reports take them along too, as `NOTES`."""
        with self.changed:
            return self.notes.take_unsent()

    def find_place(self, trial_id: str, wait_s: float = 0.0) -> Vacancy:
        """Whether the trial is here, and how many places are free; waits up to `wait_s` for one.

        Raises:
            Exception: what has ended the training thread, or kept it from starting.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self._has(trial_id) or self.seats.free_places > 0 or self.loop.stopped, timeout=wait_s
            )
            self.loop.raise_error()
            if self.start_error is not None:
                raise self.start_error
            return Vacancy(self._has(trial_id), self.seats.free_places)

    def join(self, request: TrialRequest) -> bool:
        """Let a trial join, from its last checkpoint if there is one. Does nothing if it has joined.

        Returns:
            Whether there was a place. Other trials may have taken the one that `find_place` found.

        Raises:
            UserError: its settings cannot be trained.
        """
        self.start()
        trial_id = request.trial_id
        with self.changed:
            self.changed.wait_for(lambda: not self.seats.is_leaving(trial_id) or self.loop.stopped)
            if self.seats.has_joined(trial_id):
                return True
            self.loop.raise_error()
            seat = self.seats.claim(trial_id)
        if seat is None:
            return False
        try:
            self._prepare(seat, request)
        finally:
            with self.changed:
                self.seats.cancel(seat)  # does nothing after success
                self.changed.notify_all()
        return True

    def wait_for_report(self, trial_id: str, number: int, wait_s: float) -> TrialReport | None:
        """The trial's report of this number, from 0, since it joined; None if it does not come in time.

        Raises:
            UnknownTrialError: the trial has to join again.
        """
        with self.changed:
            seat = self.seats.joined(trial_id)
            seat.next_report, seat.last_polled = number, time.monotonic()
            self.changed.notify_all()  # the trial or the next round may have waited for this call
            self.changed.wait_for(lambda: len(seat.reports) > number or self.loop.stopped, timeout=wait_s)
            seat.last_polled = time.monotonic()
            self.loop.raise_error()
            return seat.reports[number] if len(seat.reports) > number else None

    def leave(self, trial_id: str) -> None:
        """Remove a trial and drop its reports."""
        with self.changed:
            slot = self.seats.leave(trial_id)
            if slot is not None:
                slot.close()
            self.changed.notify_all()

    def _prepare(self, seat: Seat, request: TrialRequest) -> None:
        """Make a trial's slot. A trial that had ended before gets its last report again."""
        from vlmtune.packed.checkpoint_folder import fetch_last_checkpoint, read_last_report
        from vlmtune.training.best_evaluation import has_ended
        from vlmtune.training.gauges import Gauges

        assert self.engine is not None
        self.engine.checkpoints.wait_for(request.trial_id)
        last = read_last_report(request.folder)
        if last is not None and has_ended(last):
            with self.changed:
                self.seats.seat_ended(seat, TrialReport(last, last=True))
            return
        with fetch_last_checkpoint(request.folder) as checkpoint:
            slot = self.engine.slot_factory.make(
                request.trial_id,
                request.settings,
                folder=request.folder,
                runs_dir=request.runs_dir,
                checkpoint=checkpoint,
                progress=Gauges(request.trial_id, 0, request.progress),
            )
        with self.changed:
            if not self.seats.seat_slot(seat, slot):
                slot.close()

    def _has(self, trial_id: str) -> bool:
        return self.seats.get(trial_id) is not None and not self.seats.is_leaving(trial_id)
