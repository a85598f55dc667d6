"""Train many trials over one frozen base, in rounds. Trials join and leave between rounds.

A round is one batch of every trial. The rows of all trials go through the base together, in packed batches.
Each trial updates its adapter when all batches of its own step are done, and is evaluated at its own steps.
The engine knows a trial as its `Slot`: the trial's adapter, optimizer and position in its rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container
from typing import Any

import torch

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.model.memory import memory_shortage
from vlmtune.packed.build import build_model
from vlmtune.packed.checkpoint_folder import checkpoint_at
from vlmtune.packed.checkpoint_writer import CheckpointWriter
from vlmtune.packed.example_cache import ExampleCache
from vlmtune.packed.messages import BEST_CHECKPOINT, REASON, TrialReport
from vlmtune.packed.packed_batch import PackedRow
from vlmtune.packed.packed_model import PassResult
from vlmtune.packed.slot import Slot, SlotFactory
from vlmtune.packed.slot_adapter import lay_out_together
from vlmtune.packed.trial_evaluator import TrialEvaluation, TrialEvaluator
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.training.best_evaluation import BEST_STEP, LAST_CHECKPOINT, LIVE_ANSWERS
from vlmtune.training.meter import EVALUATION_NUMBER, training_flops_per_token

DOES_NOT_FIT = (
    "out of GPU memory with the adapter and one row: give a smaller --max_length or --lora_r, or "
    "--quantization nf4"
)


def ignore_end(trial_id: str) -> None:
    """The default of `Engine`'s `on_end`: do nothing."""


class Engine:
    """A frozen base and the trials that train over it.

    One thread calls `train_round` again and again, and `join` and `leave` between rounds. The class is long
    because a round, its reports and the ends of trials are one sequence.

    Args:
        settings: the settings that all trials share; each slot has those of its own trial, with the searched
            values.
        store: the prepared rows, with those of the other resolutions that trials may have.
        trials: the number of trials to train at once.
        max_lora_rank: the highest LoRA rank among the trials, for the plan of the memory.
        deliver: called with a trial's id and each of its reports, in order. The call for the final report
            comes from another thread.
        note: called with each line for the console.
        on_end: called with the id of each trial that has left or ended.
        shard: this process's part of the rows, if several workers train the same trials. The first worker
            delivers reports and writes checkpoints.
        most_demanding: settings of a trial that needs at least as much memory as every other; the plan is
            for it.

    Attributes:
        max_trials: the number of trials that the memory is planned for, at most `trials`.
        slots: the slots of the trials that train, by trial id.
        round_seconds: duration of the last round in seconds, without its evaluations.

    Raises:
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        trials: int,
        max_lora_rank: int,
        deliver: Callable[[str, TrialReport], None],
        note: Callable[[str], None],
        on_end: Callable[[str], None] = ignore_end,
        shard: WorkerShard = SINGLE_WORKER,
        most_demanding: Settings | None = None,
    ) -> None:
        self.settings, self.shard, self.deliver, self.on_end = settings, shard, deliver, on_end
        self.model, self.max_trials = build_model(
            settings, store, trials, max_lora_rank, note, most_demanding
        )
        flops_per_token = training_flops_per_token(self.model.base.get_decoder())
        self.slot_factory = SlotFactory(settings, store, flops_per_token, shard)
        self.examples = ExampleCache(store)
        processor = settings.model.ref.processor()
        self.evaluator = TrialEvaluator(settings, self.model, store, self.examples, processor, shard)
        self.checkpoints = CheckpointWriter(deliver)
        self.slots: dict[str, Slot] = {}
        self.round_seconds = 0.0

    def join(self, slot: Slot) -> None:
        """Let a trial take part from the next round on.

        A trial that does not fit in memory ends as infeasible.
        """
        others = [other.adapter for other in self.slots.values()]
        try:
            # All adapters are flat vectors of one `AdapterLayout`; a higher rank or a new layer changes it.
            layout_changed = lay_out_together(slot.adapter, others, self.model.adapters)
        except DoesNotFitError as error:
            self._end(slot, self._infeasible_metrics(memory_shortage(error)))
            return
        self.slots[slot.trial_id] = slot
        if self.shard.rank == 0:
            for each in self.slots.values() if layout_changed else [slot]:
                self.checkpoints.reserve_memory(each)

    def leave(self, trial_id: str) -> None:
        """Remove a trial, if it is still here."""
        slot = self.slots.pop(trial_id, None)
        if slot is not None:
            slot.close()
            self.on_end(trial_id)

    def train_round(self, paused: Container[str] = ()) -> bool:
        """Train one batch of every trial except those in `paused`; returns whether there was such a trial."""
        started = time.monotonic()
        self.checkpoints.raise_errors()
        slots = [slot for slot in self.slots.values() if slot.trial_id not in paused]
        if not slots:
            self._flush_logs()
            return False
        rows, data_wait_s = self._read_rows(slots)
        # The model adds each row's gradient to the slot that the row belongs to.
        result = self.model.add_gradients([row for part in rows.values() for row in part], Slot.add_gradient)
        self._flush_logs()  # log lines of the round before, while the device computes this one
        self._end_trials_that_do_not_fit(result)
        for slot, part in rows.items():
            if slot.trial_id in self.slots:
                slot.end_batch(part, result)
        due = [slot for slot in slots if slot.progress.evaluation_due]
        if due:
            self._flush_logs()
            self._synchronize()
        self.round_seconds = time.monotonic() - started
        _divide_seconds(rows, self.round_seconds, data_wait_s)
        self._evaluate([slot for slot in due if slot.trial_id in self.slots])
        return True

    def close(self) -> None:
        """Write the remaining checkpoints."""
        self.checkpoints.close()

    def _read_rows(self, slots: list[Slot]) -> tuple[dict[Slot, list[PackedRow]], float]:
        """The next batch of each trial, and the seconds that reading took.

        Reads the rest of each trial's step, and starts to read the step after it.
        """
        started = time.monotonic()
        examples = self.examples.get([row for slot in slots for row in slot.cursor.rest_of_step()])
        data_wait_s = time.monotonic() - started
        rows = {slot: slot.training_rows(examples) for slot in slots}
        self.examples.prefetch([row for slot in slots for row in slot.cursor.following_step()])
        return rows, data_wait_s

    def _synchronize(self) -> None:
        """Wait for the device, so that the time of training does not count as evaluation."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _flush_logs(self) -> None:
        """Write the log lines of earlier rounds. End the trials whose loss became NaN or infinite."""
        for slot in list(self.slots.values()):
            if not slot.flush_log():
                metrics = {"eval_loss": math.nan, "eval_seconds": 0.0, self.settings.search.metric: math.nan}
                self._end(slot, slot.report(metrics))

    def _evaluate(self, slots: list[Slot]) -> None:
        """Evaluate trials together, report them, and take a checkpoint of each.

        Reports are delivered before the checkpoints are taken, so the search decides in parallel and little
        training is wasted on trials that it stops. The final report of a trial waits until its checkpoint is
        written. After a crash, trials resume from the last written checkpoint and repeat the later reports.
        """
        if not slots:
            return
        evaluated = self.evaluator.evaluate(slots, self._end_trials_that_do_not_fit)
        reports = {slot: self._report(slot, evaluation) for slot, evaluation in evaluated.items()}
        for slot, report in reports.items():
            self._take_checkpoint(slot, report)

    def _report(self, slot: Slot, evaluation: TrialEvaluation) -> TrialReport:
        reported = slot.report(evaluation.metrics)
        answers = {LIVE_ANSWERS: evaluation.live_answers} if evaluation.live_answers else {}
        newest = checkpoint_at(slot.folder, slot.progress.step)
        best = checkpoint_at(slot.folder, reported[BEST_STEP]) if BEST_STEP in reported else newest
        paths = {BEST_CHECKPOINT: best} | ({} if best == newest else {LAST_CHECKPOINT: newest})
        report = TrialReport({**reported, **paths, **answers}, slot.progress.ended)
        if self.shard.rank == 0 and not report.final:
            self.deliver(slot.trial_id, report)
        return report

    def _take_checkpoint(self, slot: Slot, report: TrialReport) -> None:
        """Copy a checkpoint of an evaluated trial, which is written while the next rounds run.

        With its final report, the trial leaves.
        """
        if self.shard.rank == 0:
            folder = checkpoint_at(slot.folder, slot.progress.step)
            self.checkpoints.write(slot, slot.begin_checkpoint(), folder, report)
        if report.final:
            self.leave(slot.trial_id)

    def _end_trials_that_do_not_fit(self, result: PassResult) -> None:
        for slot, shortage in zip(result.too_large, result.shortages, strict=True):
            if slot.trial_id in self.slots:  # it may have ended just before, for a NaN in its log
                self._end(slot, self._infeasible_metrics(shortage))

    def _infeasible_metrics(self, shortage: str) -> dict[str, Any]:
        """The metrics of a trial that does not fit in memory.

        Args:
            shortage: how much memory it needed and how much was free; empty if not known.

        Raises:
            DoesNotFitError: several workers train the trial. The others would wait for this worker's
                gradients.
        """
        if self.shard.world_size > 1:
            raise DoesNotFitError(DOES_NOT_FIT)
        numbers = {self.settings.search.metric: math.nan, "infeasible": True, EVALUATION_NUMBER: 0}
        return {**numbers, **({REASON: shortage} if shortage else {})}

    def _end(self, slot: Slot, metrics: dict[str, Any]) -> None:
        """Remove a trial, which may not have joined yet, and deliver its final report."""
        self.slots.pop(slot.trial_id, None)
        slot.close()
        self.on_end(slot.trial_id)
        self.checkpoints.deliver_later(slot.trial_id, TrialReport(metrics, final=True))


def _divide_seconds(rows: dict[Slot, list[PackedRow]], seconds: float, data_wait_s: float) -> None:
    """Divide a round's seconds among its trials in proportion to their tokens.

    So the seconds of all trials add up to the time that the device was in use.

    Args:
        data_wait_s: seconds of the round in which the engine waited for rows to be read.
    """
    tokens = {slot: sum(row.tokens for row in part) for slot, part in rows.items()}
    total = max(sum(tokens.values()), 1)  # a worker may have no row at all in a round
    for slot, count in tokens.items():
        slot.records.add_seconds(seconds * count / total, data_wait_s * count / total)
