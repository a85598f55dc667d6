"""An engine as a Ray actor: one to a GPU. Trials call it; its own thread trains.

A call may come twice, because Ray or a trial that was started again repeats it: joining is by the trial's
id, and reports are asked for by
their number. An engine that died comes back empty, and its trials join again from their checkpoints.

Every process that is given an engine's handle imports this module, each trial's too. So what imports torch
is imported in methods.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from vlmtune.background import in_background
from vlmtune.console import labelled
from vlmtune.errors import UserError
from vlmtune.packed.messages import NOTES, UnknownTrialError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vlmtune.data.store import Store
    from vlmtune.packed.engine import Engine
    from vlmtune.packed.messages import TrialReport
    from vlmtune.packed.slot import Slot
    from vlmtune.training.launch import Progress

IDLE = 1.0  # seconds after which an engine without work looks whether its checkpoints were written
# reports that a trial may have unread before it waits: it trains on while the search decides about the last
# one
AHEAD = 2
FORGOTTEN_AFTER = 600.0  # seconds in which nobody asked for a waiting trial: its process is gone for good
MAX_RESTARTS = 8
# seconds that an engine may start after the first one, at least, before the search goes on without it
LATER = 30.0
CALLS_AT_ONCE = (
    256  # every trial waits in a call of its own, and those without a place in one or two at each engine
)
ENGINE_CPUS = 0.9  # that an engine without a GPU asks Ray for, and one with a GPU: it keeps a core busy


class EngineActor:
    """See `Engine` for the arguments. The base is loaded at the first call that needs it, also after a
    restart."""

    def __init__(
        self,
        values: dict[str, Any],
        store: Store,
        trials: int,
        rank: int,
        largest: dict[str, Any] | None = None,
    ) -> None:
        self.values, self.store, self.trials, self.rank, self.largest = values, store, trials, rank, largest
        self.changed = threading.Condition()
        self.notes: list[str] = []
        self.told = 0  # of the notes
        self.engine: Engine | None = None
        self.training: Future[None] | None = None
        self.failure: UserError | None = None  # why it could not start
        self.coming: set[str] = set()  # those that have a place and are being made ready
        self.joining: dict[str, tuple[Slot, str]] = {}
        self.leaving: set[str] = set()
        self.reports: dict[str, list[TrialReport]] = {}
        self.taken: dict[str, int] = {}
        self.asked: dict[str, float] = {}
        self.reported = False  # since the last round began

    def start(self) -> None:
        """Load the base and begin.

        Raises:
            UserError: it cannot be loaded, or does not fit.
        """
        from vlmtune.packed.engine import Engine

        with self.changed:
            if self.engine is None:
                try:
                    self.engine = Engine(
                        self.values,
                        self.store,
                        trials=self.trials,
                        rank=self.rank,
                        deliver=self._deliver,
                        note=self.notes.append,
                        largest=self.largest,
                    )
                except UserError as error:
                    self.failure = error  # else it would look like the engine with most room
                    raise
                self.failure = None
                self.trials = self.engine.trials
                self.training = in_background(partial(self._train, self.engine), "training")
                self.training.add_done_callback(lambda _: self._notify())

    def news(self) -> list[str]:
        """What was noted since it was told last. It comes with the next report, as `NOTES`, where nobody
        asks."""
        with self.changed:
            told, self.told = self.told, len(self.notes)
            return self.notes[told:]

    def room(self, trial_id: str, seconds: float = 0.0) -> tuple[bool, int]:
        """Whether the trial is here, and for how many more there are places; if there is none, waits so long
        for one.

        Raises:
            Exception: what has ended the engine's thread, or kept it from starting.
        """

        def here() -> bool:
            return trial_id in self.reports or trial_id in self.coming

        with self.changed:
            self.changed.wait_for(lambda: here() or self._places() > 0 or self._stopped(), timeout=seconds)
            self._raise_of_training()
            if self.failure is not None:
                raise self.failure
            return here(), self._places()

    def join(
        self,
        trial_id: str,
        values: dict[str, Any],
        folder: str,
        runs_dir: str,
        progress: Progress | None = None,
    ) -> bool:
        """Take a trial in, from its last checkpoint in `folder` if there is one; one that is here already
        stays as it is.

        Returns whether there was a place. Who asked for room before may come too late.

        Raises:
            UserError: its values cannot be trained.
        """
        self.start()
        with self.changed:
            if trial_id in self.reports and trial_id not in self.leaving:
                return True
            self.changed.wait_for(lambda: trial_id not in self.leaving or self._stopped())
            self._raise_of_training()
            if trial_id not in self.coming and self._places() <= 0:
                return False
            self.coming.add(trial_id)
        try:
            self._make_ready(trial_id, values, folder, runs_dir, progress)
        finally:
            with self.changed:
                self.coming.discard(trial_id)
                self.changed.notify_all()
        return True

    def _make_ready(
        self, trial_id: str, values: dict[str, Any], folder: str, runs_dir: str, progress: Progress | None
    ) -> None:
        """Let the engine take a trial that is coming in before its next round; what has ended has its last
        report once more."""
        from vlmtune.packed.checkpoint_folder import last_checkpoint, last_report
        from vlmtune.packed.messages import TrialReport
        from vlmtune.training.gauges import Gauges

        assert self.engine is not None
        self.engine.settle(trial_id)
        last, slot = last_report(folder), None
        ended = last is not None and last["step"] >= last["max_steps"]
        if not ended:
            with last_checkpoint(folder) as checkpoint:
                slot = self.engine.slot(
                    trial_id,
                    values,
                    runs_dir=runs_dir,
                    checkpoint=checkpoint,
                    progress=Gauges(trial_id, 0, progress),
                )
        with self.changed:
            if trial_id not in self.coming:  # it has left meanwhile, or came twice
                if slot is not None:
                    slot.meter.close()
                return
            self.coming.discard(trial_id)
            if slot is not None:
                self.joining[trial_id] = slot, folder
            self.reports[trial_id] = [TrialReport(last, True)] if last is not None and ended else []
            self.taken[trial_id], self.asked[trial_id] = 0, time.monotonic()

    def _places(self) -> int:
        there = (
            self.coming
            | self.joining.keys()
            | (self.engine.slots.keys() if self.engine is not None else set())
        )
        return self.trials - len(there - self.leaving)

    def wait(self, trial_id: str, number: int, seconds: float) -> tuple[dict[str, Any], bool] | None:
        """The trial's report of this number, from 0, since it joined, and whether it is the last; None if it
        is not there in time.

        Raises:
            UnknownTrialError: it has to join again.
        """
        with self.changed:
            if trial_id not in self.reports:
                raise UnknownTrialError(trial_id)
            self.taken[trial_id], self.asked[trial_id] = number, time.monotonic()
            self.changed.notify_all()  # it may have waited to be asked
            self.changed.wait_for(
                lambda: len(self.reports.get(trial_id, ())) > number or self._stopped(), timeout=seconds
            )
            self.asked[trial_id] = time.monotonic()
            self._raise_of_training()
            reports = self.reports.get(trial_id, [])
            return (reports[number].metrics, reports[number].last) if len(reports) > number else None

    def leave(self, trial_id: str) -> None:
        """Let a trial go and forget it."""
        with self.changed:
            self.coming.discard(trial_id)
            if trial_id in self.joining:
                self.joining.pop(trial_id)[0].meter.close()
            self.reports.pop(trial_id, None)
            if self.engine is not None and trial_id in self.engine.slots:
                self.leaving.add(trial_id)
            self.changed.notify_all()

    def _stopped(self) -> bool:
        return self.training is not None and self.training.done()

    def _raise_of_training(self) -> None:
        if self.training is not None and self.training.done():
            self.training.result()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _deliver(self, trial_id: str, report: TrialReport) -> None:
        with self.changed:
            if trial_id in self.reports:
                notes = self.news()
                self.reports[trial_id].append(
                    replace(report, metrics={**report.metrics, NOTES: notes}) if notes else report
                )
                self.reported = True
            self.changed.notify_all()

    def _train(self, engine: Engine) -> None:
        while True:
            if engine.early_stopping and self.reported:
                self._let_the_search_decide(engine)
            with self.changed:
                self.reported = False
                parked = self._let_in_and_out(engine)
                if not engine.slots.keys() - parked:
                    self.changed.wait(timeout=IDLE)
            engine.round(
                parked
            )  # does nothing without a trial, but to raise what kept a checkpoint from being written

    def _let_the_search_decide(self, engine: Engine) -> None:
        """Wait until the trials that have reported are stopped or asked to go on, for at most half the time
        that their next rows take.

        A trial that is stopped would train them for nothing.
        """

        def undecided() -> int:
            return sum(0 < self._unread(name) < AHEAD for name in engine.slots.keys() - self.leaving)

        with self.changed:
            limit = engine.round_seconds * undecided() / max(len(engine.slots), 1) / 2
            self.changed.wait_for(lambda: not undecided(), timeout=limit)

    def _unread(self, trial_id: str) -> int:
        """Reports that nobody has asked for; `AHEAD` of a trial that was forgotten."""
        return len(self.reports[trial_id]) - self.taken[trial_id] if trial_id in self.reports else AHEAD

    def _let_in_and_out(self, engine: Engine) -> set[str]:
        """Between rounds: trials that leave or join; returns those that wait until somebody takes their
        reports."""
        parked = {name for name in engine.slots if self._unread(name) >= AHEAD}
        forgotten = {
            name for name in parked if time.monotonic() - self.asked.get(name, 0.0) > FORGOTTEN_AFTER
        }
        for trial_id in self.leaving | forgotten:
            engine.leave(trial_id)
        for trial_id in forgotten:
            self.reports.pop(trial_id, None)  # whoever asks after all has to join again
        self.leaving.clear()
        while self.joining:
            engine.join(*self.joining.pop(next(iter(self.joining))))
        self.changed.notify_all()
        return parked


def start_engines(
    values: dict[str, Any],
    store: Store,
    *,
    count: int,
    trials: int,
    rank: int,
    gpu: bool,
    largest: dict[str, Any] | None = None,
) -> tuple[list[ActorHandle[Any]], list[str]]:
    """`count` engines, each with a GPU of its own or on CPUs, and what they have noted. They end with this
    process.

    Those whose GPU something else holds take trials as soon as it is theirs.

    Raises:
        DoesNotFitError: the base does not fit in a GPU's memory.
    """
    remote: Any = ray.remote(EngineActor)
    options = {
        "num_cpus": ENGINE_CPUS,
        "num_gpus": 1 if gpu else 0,
        "max_concurrency": CALLS_AT_ONCE,
        "max_restarts": MAX_RESTARTS,
    }
    engines = [remote.options(**options).remote(values, store, trials, rank, largest) for _ in range(count)]
    starts = [engine.start.remote() for engine in engines]
    started = time.monotonic()
    if not ray.wait(starts, timeout=LATER)[0]:
        device = "GPU" if gpu else "CPU"
        logger.info(labelled("Waiting", f"for a {device} that is free and the base that it loads"))
        ray.wait(starts)
    ready, waiting = ray.wait(starts, num_returns=count, timeout=max(LATER, time.monotonic() - started))
    try:
        ray.get(ready)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    begun = [engine for engine, start in zip(engines, starts, strict=True) if start in ready]
    notes = list(
        dict.fromkeys(note for noted in ray.get([engine.news.remote() for engine in begun]) for note in noted)
    )
    if waiting:
        what = "GPU" if gpu else "CPU"
        free = f"{len(ready)} of {count} {what}s are free"
        notes.append(labelled("", f"{free}; trials use the others when they are"))
    return engines, notes
