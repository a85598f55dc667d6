"""`TrialEvaluator`: evaluates trials of an engine together, each with its own adapter."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import ReadExamples
from vlmtune.evaluation.live_answers import Answered, LiveAnswers
from vlmtune.evaluation.objective import Objective, ScoredAnswers
from vlmtune.packed.example_cache import ExampleCache
from vlmtune.packed.packed_model import PackedModel, PassResult
from vlmtune.packed.slot import Slot
from vlmtune.packed.worker_shard import WorkerShard

EVALUATED_AT_ONCE = 64  # evaluation rows that are in memory at once


class TrialEvaluation(NamedTuple):
    """The metrics of a trial, and its answers to the fixed rows for the page of the search, if any."""

    metrics: dict[str, float]
    live_answers: Answered


class TrialEvaluator:
    """Computes the loss of trials on all evaluation rows at full length, and the metric of the search.

    Args:
        model: the engine's model.
        store: the prepared rows, with those of the other resolutions that trials may have.
        examples: cached examples of the store.
        processor: the base model's processor.
        shard: this process's part of the rows.
    """

    def __init__(
        self,
        settings: Settings,
        model: PackedModel,
        store: Store,
        examples: ExampleCache,
        processor: Any,
        shard: WorkerShard,
    ) -> None:
        self.model, self.store, self.examples, self.processor = model, store, examples, processor
        self.shard = shard
        self.objective = Objective.of(settings)  # None if the metric is the loss
        self.live = LiveAnswers.of(settings) if shard.rank == 0 else None
        self.live_counts = Counter[str]()  # how often each trial's live answers were generated
        self.row_numbers = [int(row) for row in store.rows_of(EVAL)]

    def evaluate(
        self, slots: Sequence[Slot], end_trials_that_do_not_fit: Callable[[PassResult], None]
    ) -> dict[Slot, TrialEvaluation]:
        """Evaluate trials.

        Args:
            slots: the slots of the trials to evaluate.
            end_trials_that_do_not_fit: called with the result of each pass, to end the trials in its
                `too_large`. These are then left out.
        """
        started = time.monotonic()
        totals = {slot: torch.zeros(2, dtype=torch.float64, device=self.model.device) for slot in slots}
        row_numbers = self.row_numbers[self.shard.rank :: self.shard.world_size]
        for first in range(0, len(row_numbers), EVALUATED_AT_ONCE):
            result = self._add_losses(slots, row_numbers[first : first + EVALUATED_AT_ONCE], totals)
            end_trials_that_do_not_fit(result)
            slots = [slot for slot in slots if slot not in result.too_large]
        sums = {slot: self.shard.all_reduce_sum(totals[slot]).tolist() for slot in slots}
        scored = {slot: self._score_answers(slot) for slot in slots}
        seconds = (time.monotonic() - started) / max(len(slots), 1)
        # The time for live answers may not suffice for all trials: those with the fewest come first.
        in_turn = sorted(slots, key=lambda slot: self.live_counts[slot.trial_id])
        live = {slot: self._live_answers(slot, scored[slot]) for slot in in_turn}
        return {
            slot: TrialEvaluation(
                {"eval_loss": loss / labelled_tokens, **scored[slot].metrics, "eval_seconds": seconds},
                live[slot],
            )
            for slot, (loss, labelled_tokens) in sums.items()
        }

    def _add_losses(
        self, slots: Sequence[Slot], row_numbers: Sequence[int], totals: dict[Slot, torch.Tensor]
    ) -> PassResult:
        """Add the summed loss and the number of labelled tokens of these rows to each trial's totals.

        Args:
            row_numbers: of the rows in the store of a trial's resolution.
        """
        numbers = {slot: [slot.first_number + number for number in row_numbers] for slot in slots}
        examples = self.examples.get([number for part in numbers.values() for number in part])
        rows = {
            slot: [slot.packed_row(number, examples[number]) for number in part]
            for slot, part in numbers.items()
        }
        result = self.model.losses([row for part in rows.values() for row in part])
        for slot, part in rows.items():
            if slot not in result.too_large:
                losses = torch.stack([result.rows[id(row)][0] for row in part])
                totals[slot][0] += losses.double().sum()
                totals[slot][1] += sum(int((row.example.labels >= 0).sum()) for row in part)
        return result

    def _score_answers(self, slot: Slot) -> ScoredAnswers:
        """The metric of a trial's generated answers; empty if the search optimizes the loss."""
        if self.objective is None:
            return ScoredAnswers()
        with self.model.single_adapter(slot.adapter.flat, slot.adapter.scaling) as model:
            return self.objective.measure(
                model,
                self.processor,
                self.store.at(slot.settings.model.resolution),
                self._reader(slot),
                last=slot.progress.ended,
                rank=self.shard.rank,
                world_size=self.shard.world_size,
            )

    def _live_answers(self, slot: Slot, scored: ScoredAnswers) -> Answered:
        """A trial's answers to the fixed rows: those that were scored, or generated if there is time."""
        if self.live is None:
            return []
        store = self.store.at(slot.settings.model.resolution)
        if scored.texts:
            return self.live.reuse(self.processor, store, self._reader(slot), scored.texts)
        if not self.live.due:
            return []
        self.live_counts[slot.trial_id] += 1
        with self.model.single_adapter(slot.adapter.flat, slot.adapter.scaling) as model:
            return self.live.generate(model, self.processor, store, self._reader(slot))

    def _reader(self, slot: Slot) -> ReadExamples:
        """Reads evaluation rows of the store of a trial's resolution from the cached examples."""
        first = slot.first_number

        def read(_: Store, rows: Sequence[int]) -> list[EncodedExample]:
            examples = self.examples.get([first + row for row in rows])
            return [examples[first + row] for row in rows]

        return read
