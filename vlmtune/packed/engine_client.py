"""`EngineClient`: a trial's connection to an engine. It joins, reads reports, and joins again if needed.

This module imports neither torch nor transformers, because a search starts several processes that use it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from vlmtune.errors import UserError
from vlmtune.packed.messages import NOTES, Availability, TrialReport, UnknownTrialError

CALL_WAIT_S = 20.0  # longest wait of one call
# Wait for the other engines' answers after the first answer. Those engines may be starting, or gone.
OTHER_ANSWERS_WAIT_S = 1.0
FULL_WAIT_S = 2.0  # wait for a free slot if all are taken, before all engines are asked again
RETRY_PAUSE_S = 1.0  # pause between attempts to reach an engine that is restarting
UNREACHABLE_LIMIT_S = 60.0  # time without an answer after which the trial looks for another engine


class EngineClient:
    """Joins a trial to one of the engines, and reads its reports one after another.

    Args:
        engines: handles of `EngineActor`.
        trial_id: the trial's id.
        join: calls `EngineActor.join` of an engine with the trial's request, and returns the ObjectRef of the
            answer.

    Attributes:
        engine: the engine that the trial has joined; None before it joins, and when it has to join again.
        next_report: number of the next report to read, counted from 0 since the trial joined.
    """

    def __init__(
        self, engines: Sequence[ActorHandle[Any]], trial_id: str, join: Callable[[ActorHandle[Any]], Any]
    ) -> None:
        self.engines, self.trial_id, self.join = list(engines), trial_id, join
        self.engine: ActorHandle[Any] | None = None
        self.next_report = 0
        self._unreachable_s = 0.0  # time without an answer of the engine
        self._last_step = 0  # step of the last report
        self._notes: list[str] = []  # the engine's lines to pass on with the next report

    def read_report(self) -> TrialReport:
        """Wait for the trial's next report. Before that, the trial joins an engine if it is in none.

        After an engine died, the trial resumes from its last checkpoint, and repeats its later reports. These
        repeated reports are skipped.

        Raises:
            UserError: the trial cannot be trained. This is the engine's exception itself, not Ray's.
            RayTaskError: the engine's training has failed.
            RayActorError: the engine is gone for good.
        """
        while True:
            if self.engine is None:
                self._join()
            report = self._poll()
            if report is None:
                continue
            self.next_report += 1
            self._notes += report.metrics.get(NOTES, [])
            if report.final or report.metrics["step"] > self._last_step:
                self._last_step = report.metrics.get("step", 0)
                metrics = {name: value for name, value in report.metrics.items() if name != NOTES}
                notes, self._notes = self._notes, []
                return replace(report, metrics={**metrics, **({NOTES: notes} if notes else {})})

    def leave(self) -> None:
        """Ask the engine to remove the trial."""
        if self.engine is not None:
            self.engine.leave.remote(self.trial_id)
            self.engine = None

    def _poll(self) -> TrialReport | None:
        """Ask for the next report once; None if there is none yet, or the trial has to join again."""
        assert self.engine is not None
        call: Any = self.engine.wait_for_report.remote(self.trial_id, self.next_report, CALL_WAIT_S)
        try:
            report: TrialReport | None = ray.get(call)
        except ActorUnavailableError:
            time.sleep(RETRY_PAUSE_S)
            self._unreachable_s += RETRY_PAUSE_S
            if self._unreachable_s > UNREACHABLE_LIMIT_S:
                self.engine = None
            return None
        except RayTaskError as error:
            if not isinstance(error.cause, UnknownTrialError):
                raise
            self.engine = None
            return None
        self._unreachable_s = 0.0
        return report

    def _join(self) -> None:
        """Join an engine that has a free slot. Wait while none has one, or none answers."""
        while self.engine is None:
            try:
                engine = self._choose_engine()
                if engine is not None and ray.get(self.join(engine)):
                    self.engine, self.next_report, self._unreachable_s = engine, 0, 0.0
            except ActorUnavailableError:
                time.sleep(RETRY_PAUSE_S)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise

    def _choose_engine(self) -> Any:
        """Choose the engine that has the trial already, or else the one with the most free slots.

        Engines that do not answer are left out, because their node may be gone for good.

        Returns:
            The engine's handle; None if all slots are taken, after a short wait for a free one.

        Raises:
            RayTaskError: all engines that answer have failed; this is the error of one of them.
            ActorUnavailableError: none answers.
        """
        calls: list[Any] = [engine.check_availability.remote(self.trial_id) for engine in self.engines]
        ray.wait(calls, timeout=CALL_WAIT_S)
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=OTHER_ANSWERS_WAIT_S)
        choices: list[tuple[Availability, int, ActorHandle[Any]]] = []
        errors: list[Exception] = [ActorUnavailableError("no engine answers", None)]
        for call in answered:
            number = calls.index(call)
            # Trials that ask at the same time do not all choose the same engine.
            tie_break = zlib.crc32(f"{self.trial_id} {number}".encode())
            try:
                choices.append((ray.get(call), tie_break, self.engines[number]))
            except (RayActorError, RayTaskError) as error:
                errors.append(error)
        if not choices:
            raise errors[-1]
        availability, _, engine = max(choices, key=lambda choice: choice[:2])
        if availability.has_trial or availability.free_slots > 0:
            return engine
        ray.wait(
            [engine.check_availability.remote(self.trial_id, FULL_WAIT_S) for *_, engine in choices],
            timeout=CALL_WAIT_S,
        )
        return None
