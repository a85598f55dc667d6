"""`StepLog`: writes the log of a step while the next step runs.

The Trainer itself reads loss and gradient norm as soon as a step is launched, and waits for the device. After
that, the device has no work until Python launches the next kernel: some ten milliseconds of a training step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from vlmtune.model.transfer import AsyncHostCopy, is_asynchronous


@dataclass(frozen=True)
class PendingLog:
    """The loss, gradient norm, and correct and labelled tokens of `steps` steps, being copied to the CPU."""

    numbers: AsyncHostCopy
    learning_rate: float
    steps: int


class StepLog(TrainerCallback):
    """Sums each step's numbers on the device, and logs them in place of the Trainer.

    Args:
        log: the Trainer's method `log`.
        gather: returns the values of all workers for a tensor of this worker.
        filter_nan: whether a NaN or infinite loss is replaced by the mean of those before it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        log: Callable[[dict[str, float]], None],
        gather: Callable[[Tensor], Tensor],
        filter_nan: bool,
    ) -> None:
        self.device, self.log, self.gather, self.filter_nan = device, log, gather, filter_nan
        self.loss = torch.zeros((), device=device)  # this and the next two: since the last log
        self.tokens = torch.zeros(2, dtype=torch.int64, device=device)  # correct, labelled tokens
        self.logged_step = 0
        self.norm = torch.tensor(math.nan)  # the gradient norm of the last step
        self.learning_rate = 0.0
        self.pending: PendingLog | None = None

    def count_tokens(self, correct: Tensor, labelled_tokens: Tensor) -> None:
        """Add the correct and labelled tokens of a micro-batch."""
        self.tokens += torch.stack([correct, labelled_tokens])

    def count_loss(self, loss: Tensor, step: int) -> None:
        """Add the loss of a batch of this device, in the step after step `step`."""
        if self.filter_nan:
            loss = torch.where(loss.isfinite(), loss, self.loss / (1 + step - self.logged_step))
        self.loss += loss

    def flush(self) -> None:
        """Log the recorded steps, if that was not done yet."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        loss, norm, correct, labelled_tokens = pending.numbers.tolist()
        logs = {"loss": loss / pending.steps, "grad_norm": norm, "learning_rate": pending.learning_rate}
        self.log({**logs, "mean_token_accuracy": correct / max(labelled_tokens, 1)})

    def reset(self) -> None:
        """Discard the sums since the last log."""
        self.loss.zero_()
        self.tokens.zero_()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.logged_step = state.global_step
        self.reset()

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Read here, before the schedule's next step.
        self.learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._record(state, control)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._record(state, control)

    def _record(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Start to copy the numbers of the last steps to the CPU, if a log entry is due."""
        if control.should_log and state.global_step > self.logged_step:
            loss, norm = self.gather(self.loss).mean(), self.norm.to(self.device)
            numbers = torch.cat([torch.stack([loss.double(), norm.double()]), self.tokens.double()])
            steps = state.global_step - self.logged_step
            self.pending = PendingLog(AsyncHostCopy(numbers), self.learning_rate, steps)
            self.logged_step = state.global_step
            self.reset()
        control.should_log = False  # the Trainer's own log would wait for the device
        ends = state.global_step >= state.max_steps
        if control.should_evaluate or control.should_save or ends or not is_asynchronous(self.device):
            self.flush()
        return control
