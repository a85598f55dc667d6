"""Evaluate an adapter: its loss on the whole evaluation set, and the metric of its answers if searched."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vlmtune.data.examples import read_examples
from vlmtune.evaluation.live_answers import Answered, LiveAnswers
from vlmtune.evaluation.objective import Objective, ScoredAnswers
from vlmtune.model.head import log_probs_at_labels
from vlmtune.model.step import AcceleratedStep
from vlmtune.training.batches import Batch, WorkerBatches
from vlmtune.training.vision_cache import VisionCache


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on this worker's part of the evaluation rows. The model must be in evaluation mode.

    Attributes:
        accelerated_step: the accelerations of `model`.
        vision: cached vision features.
        batches: the batches of this worker.
        objective: the metric of generated answers beside the loss, if any.
        live: the fixed rows that are answered for the page of a search, if any.
        autocast: the context manager in which the trainer computes a loss.
    """

    model: Any
    processor: Any
    accelerated_step: AcceleratedStep
    vision: VisionCache
    batches: WorkerBatches
    objective: Objective | None
    live: LiveAnswers | None
    autocast: Callable[[], AbstractContextManager[Any]]

    def loss(self, per_device: int) -> float:
        """The mean negative log-likelihood of all labelled tokens of the evaluation rows, over all workers.

        Rows have their full length, so the loss does not depend on batch size, `max_length` or the number of
        workers.

        Args:
            per_device: rows of a batch.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for batch in self.batches.evaluation(per_device):
            self.vision.add(batch)
            total += self.accelerated_step.sum_without_gradients(batch, self._negative_log_likelihood)
        if self.batches.order.world_size > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def score_answers(self, *, last: bool) -> ScoredAnswers:
        """The metric of generated answers; empty if `objective` is None.

        Args:
            last: whether this is the run's last evaluation.
        """
        if self.objective is None:
            return ScoredAnswers()
        rank, world_size = self.batches.rank, self.batches.order.world_size
        return self.objective.measure(
            self.model,
            self.processor,
            self.batches.store,
            read_examples,
            last=last,
            rank=rank,
            world_size=world_size,
        )

    def live_answers(self, scored: ScoredAnswers) -> Answered:
        """Answers to the fixed rows; empty if there are none, and on all workers but the first.

        Args:
            scored: answers that were generated anyway; they are used if there are any.
        """
        if self.live is None or self.batches.rank != 0:
            return []
        if scored.texts:
            return self.live.reuse(self.processor, self.batches.store, read_examples, scored.texts)
        if not self.live.due:
            return []
        return self.live.generate(self.model, self.processor, self.batches.store, read_examples)

    def _negative_log_likelihood(self, batch: Batch) -> torch.Tensor:
        """`[2]`: the negative log-likelihood summed over the labelled tokens of a batch, and their number."""
        with self.autocast():
            outputs = log_probs_at_labels(self.model, self.vision.inputs(batch))
        return torch.stack([-outputs.log_probs.double().sum(), outputs.label_mask.sum().double()])
