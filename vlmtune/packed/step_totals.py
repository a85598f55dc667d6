"""Sum the losses and correct tokens of a trial's steps on the device, without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmtune.model.transfer import AsyncHostCopy
from vlmtune.packed.worker_shard import WorkerShard


class StepTotals:
    """Sums over the rows of one optimizer step that is in progress.

    Args:
        labelled_tokens: number of labelled tokens in this process's rows of the step.
        device: the device that the trial trains on.

    Attributes:
        loss: the mean loss over the labelled tokens so far, a scalar on the device.
        correct: the number of correctly predicted tokens so far, a scalar on the device.
        has_images: whether any row of the step has an image.
    """

    def __init__(self, labelled_tokens: int, device: torch.device) -> None:
        self.labelled_tokens, self.device, self.has_images = labelled_tokens, device, False
        self.loss, self.correct = self._scalar(0), self._scalar(0)

    @property
    def weight(self) -> float:
        """The factor of each row's summed loss: one divided by the number of labelled tokens of the step."""
        return 1 / max(self.labelled_tokens, 1)

    def add(self, losses: Tensor, correct: Tensor) -> None:
        """Add rows: `losses` are their summed losses, `correct` their numbers of correct tokens, one a
        row."""
        self.loss = self.loss + losses.sum() * self.weight
        self.correct = self.correct + correct.sum()

    def all_reduce(self, shard: WorkerShard, gradient: Tensor, *, reduce_has_images: bool) -> Tensor:
        """Replace `gradient`, of the adapter's flat vector, and the totals by their values over all workers.

        Args:
            reduce_has_images: replace `has_images` too, for which this waits for the device.

        Returns:
            The number of labelled tokens of all workers, a scalar on the device.
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
        if reduce_has_images:
            self.has_images = bool(has_images > 0)
        return labelled_tokens

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=self.device)


@dataclass(frozen=True)
class LoggedSteps:
    """The numbers of one log line.

    Attributes:
        values: the logged numbers, by the names that SFTTrainer logs them under.
        step: the last of these steps.
        first_loss: the loss of the first of these steps.
        finite: whether loss and gradient norm of every step are finite.
    """

    values: dict[str, float]
    step: int
    finite: bool
    first_loss: float


class LossLog:
    """Totals of the steps since the last log line. They are copied to the CPU while the next round trains."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._pending: tuple[dict[str, float], int, AsyncHostCopy] | None = None

    def add(self, totals: StepTotals, norm: Tensor, labelled_tokens: Tensor) -> None:
        """Add a step: its totals, the norm of its gradient, and its labelled tokens."""
        self._steps.append(
            torch.stack([totals.loss.double(), totals.correct.double(), norm.double(), labelled_tokens])
        )

    def close_line(self, *, learning_rate: float, epoch: float, step: int) -> None:
        """Close a log line: start to copy the totals of the steps since the last line to the CPU."""
        numbers = {"learning_rate": learning_rate, "epoch": epoch}
        self._pending = numbers, step, AsyncHostCopy(torch.stack(self._steps))
        self._steps = []

    def read_line(self) -> LoggedSteps | None:
        """The line that was closed last; None if it was read already. Waits until it is copied."""
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
