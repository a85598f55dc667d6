"""`TrialEvaluator`: evaluates trials of an engine together, each with its own adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmtune.config.settings import Settings
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.evaluation.objective import Objective, read_from_memory
from vlmtune.packed.example_cache import ExampleCache
from vlmtune.packed.packed_model import PackedModel, PassResult
from vlmtune.packed.slot import Slot
from vlmtune.packed.worker_shard import WorkerShard

EVALUATED_AT_ONCE = 64  # evaluation rows that are in memory at once


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
        self.row_numbers = [int(row) for row in store.rows_of(EVAL)]

    def evaluate(
        self, slots: Sequence[Slot], end_trials_that_do_not_fit: Callable[[PassResult], None]
    ) -> dict[Slot, dict[str, float]]:
        """The metrics of each trial.

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
        answers = {slot: self._score_answers(slot) for slot in slots}
        seconds = (time.monotonic() - started) / max(len(slots), 1)
        return {
            slot: {"eval_loss": loss / labelled_tokens, **answers[slot], "eval_seconds": seconds}
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

    def _score_answers(self, slot: Slot) -> dict[str, float]:
        """The metric of a trial's generated answers; empty if the search optimizes the loss."""
        if self.objective is None:
            return {}
        first = slot.first_number
        examples = self.examples.get([first + number for number in self.row_numbers])
        read = read_from_memory({number - first: example for number, example in examples.items()})
        with self.model.single_adapter(slot.adapter.flat, slot.adapter.scaling) as model:
            return self.objective.measure(
                model,
                self.processor,
                self.store.at(slot.settings.model.resolution),
                read,
                last=slot.progress.ended,
                rank=self.shard.rank,
                world_size=self.shard.world_size,
            )
