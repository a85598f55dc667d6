"""Sums up the loss and accuracy of a trial's steps on the device, without waiting for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmtune.model.transfer import AsyncHostCopy
from vlmtune.packed.worker_shard import WorkerShard


class StepTotals:
    """Sums over the rows of one optimizer step under way.

    Args:
        labelled_tokens: labelled tokens of this process's rows of the step.
        device: the device that the trial trains on.

    Attributes:
        has_images: whether any row of the step has an image.
    """

    def __init__(self, labelled_tokens: int, device: torch.device) -> None:
        self.labelled_tokens, self.device, self.has_images = labelled_tokens, device, False
        self.loss, self.correct = self._scalar(0), self._scalar(0)

    @property
    def weight(self) -> float:
        """The factor of each row's summed loss: one over the labelled tokens of the step."""
        return 1 / max(self.labelled_tokens, 1)

    def add(self, losses: Tensor, correct: Tensor) -> None:
        """Add rows: their summed losses and numbers of correct tokens, each `[B]`."""
        self.loss = self.loss + losses.sum() * self.weight
        self.correct = self.correct + correct.sum()

    def all_reduce(self, shard: WorkerShard, gradient: Tensor, *, needs_has_images: bool) -> Tensor:
        """Replace `gradient` `[P]` and the totals by those of all workers; returns their labelled tokens.

        Args:
            needs_has_images: replace `has_images` too, for which this waits for the device.
        """
        if shard.world_size == 1:
            return self._scalar(self.labelled_tokens)
        local_tokens = self.labelled_tokens
        numbers = torch.stack(
            [
                self._scalar(local_tokens),
                self.loss * local_tokens,
                self.correct,
                self._scalar(self.has_images),
            ]
        ).to(gradient.dtype)
        gradients, sums = shard.all_reduce_sum(torch.cat([gradient * local_tokens, numbers])).split(
            [len(gradient), len(numbers)]
        )
        labelled_tokens: Tensor
        labelled_tokens, loss, self.correct, has_images = sums.double().unbind()
        gradient.copy_(gradients / sums[0].clamp(min=1))
        self.loss = loss / labelled_tokens.clamp(min=1)
        if needs_has_images:
            self.has_images = bool(has_images > 0)
        return labelled_tokens

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=self.device)


@dataclass(frozen=True)
class LoggedSteps:
    """The numbers of one log line.

    Attributes:
        values: by the names that SFTTrainer logs them under.
        first_loss: of the first of these steps.
        finite: whether loss and gradient norm of every step are finite.
    """

    values: dict[str, float]
    step: int
    finite: bool
    first_loss: float


class LossLog:
    """Totals of the steps since the last log line. They are copied to the CPU while the next round runs."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._pending: tuple[dict[str, float], int, AsyncHostCopy] | None = None

    def add(self, totals: StepTotals, norm: Tensor, labelled_tokens: Tensor) -> None:
        """Add a step: its totals, the norm of its gradient, and its labelled tokens."""
        self._steps.append(
            torch.stack([totals.loss.double(), totals.correct.double(), norm.double(), labelled_tokens])
        )

    def close_line(self, *, learning_rate: float, epoch: float, step: int) -> None:
        """Begin the copy of the steps since the last line."""
        numbers = {"learning_rate": learning_rate, "epoch": epoch}
        self._pending = numbers, step, AsyncHostCopy(torch.stack(self._steps))
        self._steps = []

    def read_line(self) -> LoggedSteps | None:
        """The line that was closed last, once; None if there is none. Waits for its copy."""
        if self._pending is None:
            return None
        numbers, step, copied = self._pending
        self._pending = None
        steps = copied.tolist()  # [steps, 4]: loss, correct, gradient norm, labelled tokens
        values = {
            "loss": sum(row[0] for row in steps) / len(steps),
            "grad_norm": steps[-1][2],
            **numbers,
            "mean_token_accuracy": sum(row[1] for row in steps) / max(sum(row[3] for row in steps), 1),
        }
        finite = all(math.isfinite(value) for row in steps for value in row)
        return LoggedSteps(values, step, finite, steps[0][0])
