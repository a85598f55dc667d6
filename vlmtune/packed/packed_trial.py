"""A packed trial as Tune sees it: an ordinary class `Trainable` of a hundredth of a CPU, which drives a slot
of an engine.

This process imports neither torch nor transformers: a search starts several of them.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from ray import tune
from ray.actor import ActorHandle

from vlmtune.errors import UserError
from vlmtune.packed.messages import FAILURE, NOTES, UnknownTrialError

WAIT = 20.0  # seconds that one call waits in the engine
ANSWER = (
    1.0  # seconds in which an engine says whether it has room, where others have: it may be starting, or gone
)
POLL = 2.0  # seconds that an engine without room is waited for
PAUSE = 1.0  # between attempts to reach an engine that is starting again
PATIENCE = 60.0  # seconds of such attempts, after which the trial looks for another engine


class PackedTrial(tune.Trainable):
    """One evaluation of the trial a step. Config: the trial's own values, or those under `point_key`."""

    failure: str | None
    missed: float  # seconds since its engine answered last
    reported: int  # the step of its last report
    notes: list[str]  # of its engine, to be passed on with the next report

    def setup(
        self,
        config: dict[str, Any],
        *,
        values: dict[str, Any] | None = None,
        engines: Sequence[ActorHandle[Any]] = (),
        output_dir: str = "",
        point_key: str = "",
    ) -> None:
        """Args: `values` of all trials; `engines` to choose from; `output_dir` of the search."""
        self.shared, self.engines, self.output_dir, self.point_key = (
            values or {},
            list(engines),
            output_dir,
            point_key,
        )
        self.engine: Any = None
        self._begin(config)

    def step(self) -> dict[str, Any]:
        while True:
            if self.engine is None and self.failure is None:
                self._join()
            if self.failure is not None:
                return {FAILURE: self.failure, self.values.get("metric", "eval_loss"): math.nan, "done": True}
            try:
                report = ray.get(self.engine.wait.remote(self.name, self.taken, WAIT))
            except ray.exceptions.ActorUnavailableError:
                time.sleep(PAUSE)
                self.missed += PAUSE
                if self.missed > PATIENCE:
                    self.engine = None
                continue
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UnknownTrialError):
                    raise
                self.engine = None
                continue
            self.missed = 0.0
            if report is not None:
                metrics, last = report
                self.taken += 1
                self.notes += metrics.get(NOTES, [])
                if (
                    last or metrics["step"] > self.reported
                ):  # an engine that died may report once more what it had not written
                    self.reported, notes, self.notes = metrics.get("step", 0), self.notes, []
                    return {**metrics, **({NOTES: notes} if notes else {}), "done": last}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Be another trial from now on, which spares the search a process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        if self.engine is not None:
            self.engine.leave.remote(self.name)
            self.engine = None

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the engine keeps the trial's checkpoints, and joining finds them."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None: ...

    def _begin(self, config: dict[str, Any]) -> None:
        """Joining is left to the first step: Tune starts a trial again whose process ends in a step, and not
        one that has yet to begin."""
        self.name = self.trial_id
        self.values = {**self.shared, **config.get(self.point_key, config)}
        self.engine, self.failure, self.reported, self.notes = None, None, 0, []

    def _join(self) -> None:
        """Join an engine that has a place; where none has one, or none answers, wait for it."""
        folder, runs = f"{self.output_dir}/tune/train/{self.name}", f"{self.output_dir}/runs/{self.name}"
        while True:
            try:
                engine = self._roomiest()
                if engine is not None and ray.get(engine.join.remote(self.name, self.values, folder, runs)):
                    self.engine, self.taken, self.missed = engine, 0, 0.0
                    return
            except ray.exceptions.ActorUnavailableError:
                time.sleep(PAUSE)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                self.failure = str(error.cause)
                return

    def _roomiest(self) -> ActorHandle[Any] | None:
        """The engine that has the trial already, or else the one with most room, of those that answer: a
        node may be gone for good.

        None if all are full, after a while in which one may have got a place.

        Raises:
            RayTaskError: what has ended the engines' threads, where it has ended all that answer.
            ActorUnavailableError: none answers.
        """
        asked: list[Any] = [engine.room.remote(self.name) for engine in self.engines]
        ray.wait(asked, timeout=WAIT)
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER)
        found: list[tuple[tuple[bool, int], int, ActorHandle[Any]]] = []
        errors: list[Exception] = [ray.exceptions.ActorUnavailableError("no engine answers", None)]
        for call in answered:
            number = asked.index(call)
            spread = zlib.crc32(
                f"{self.name} {number}".encode()
            )  # trials that come at once do not all choose the same one
            try:
                found.append((ray.get(call), spread, self.engines[number]))
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                errors.append(error)
        if not found:
            raise errors[-1]
        (there, places), _, engine = max(found, key=lambda one: one[:2])
        if there or places > 0:
            return engine
        ray.wait([engine.room.remote(self.name, POLL) for *_, engine in found], timeout=WAIT)
        return None
