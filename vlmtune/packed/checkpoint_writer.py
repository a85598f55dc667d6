"""`CheckpointWriter`: writes checkpoints and delivers final reports in threads, while training continues."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from vlmtune.model_ref import ModelRef
from vlmtune.packed.checkpoint_folder import write_checkpoint
from vlmtune.packed.messages import TrialReport
from vlmtune.packed.slot import PendingCheckpoint, Slot

WRITER_THREADS = 4  # several, so that a trial's final report waits only for the trial's own checkpoint
# Largest number of a trial's checkpoints that wait to be written. Each holds the adapter and the optimizer's
# averages in pinned memory. With more, training waits for the disk.
MAX_UNWRITTEN = 2


class CheckpointWriter:
    """Writes the checkpoints of all trials. Those of one trial are written one after another.

    Args:
        deliver: called with a trial's id and its final report.
    """

    def __init__(self, deliver: Callable[[str, TrialReport], None]) -> None:
        self.deliver = deliver
        self._processors: dict[ModelRef, Any] = {}  # one for each image resolution of the trials
        self._processor_lock = Lock()
        self._threads = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="checkpoints")
        # The latest writes and deliveries of each trial, and all whose errors were not looked at yet.
        self._latest: dict[str, deque[Future[None]]] = defaultdict(partial(deque, maxlen=MAX_UNWRITTEN))
        self._unchecked: list[Future[None]] = []

    def write(self, slot: Slot, checkpoint: PendingCheckpoint, folder: str, report: TrialReport) -> None:
        """Write a checkpoint with the report's metrics in a thread, and then deliver a trial's final report.

        Returns at once, unless `MAX_UNWRITTEN` checkpoints of the trial wait already.
        """

        def work() -> None:
            write_checkpoint(
                lambda local: checkpoint.write(local, partial(self._save_processor, slot.settings.model.ref)),
                folder,
                report.metrics,
            )
            slot.records.publish_runs()
            if report.final:
                self.deliver(slot.trial_id, report)

        self._submit(slot.trial_id, work)

    def deliver_later(self, trial_id: str, report: TrialReport) -> None:
        """Deliver a trial's final report, which has no checkpoint, once its checkpoints are written."""
        self._submit(trial_id, partial(self.deliver, trial_id, report))

    def reserve_memory(self, slot: Slot) -> None:
        """Allocate the memory for the slot's next checkpoint in a thread.

        An error is not raised here, because copying the checkpoint raises it again.
        """
        self._threads.submit(slot.adapter.reserve_host_memory)

    def wait_for(self, trial_id: str) -> None:
        """Wait until a trial's checkpoints are written. Any thread may call this. It raises no errors."""
        for future in list(self._latest[trial_id]):
            future.exception()

    def raise_errors(self) -> None:
        """Raise the error of a checkpoint that could not be written, if there is one."""
        for future in [future for future in self._unchecked if future.done()]:
            self._unchecked.remove(future)
            future.result()

    def close(self) -> None:
        """Write the remaining checkpoints."""
        self._threads.shutdown()
        self.raise_errors()

    def _submit(self, trial_id: str, work: Callable[[], None]) -> None:
        latest = self._latest[trial_id]
        # Submitted before `run`, so a thread works on it already when `run` waits for it: there is no
        # deadlock.
        previous = latest[-1] if latest else None
        if len(latest) == MAX_UNWRITTEN:
            latest[0].exception()

        def run() -> None:
            if previous is not None:
                previous.result()
            work()

        latest.append(self._threads.submit(run))
        self._unchecked.append(latest[-1])

    def _save_processor(self, model: ModelRef, folder: Path) -> None:
        """Save the base's processor, at the trial's resolution, into a local folder."""
        with self._processor_lock:  # trials share it
            if model not in self._processors:
                self._processors[model] = model.processor()
            self._processors[model].save_pretrained(str(folder))
