"""Count a trial's steps, and decide after each whether to log, to evaluate, or to end the trial."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.sft_config import SFTConfig

from vlmtune.data.order import Order
from vlmtune.training.best_evaluation import EvaluationRule
from vlmtune.training.meter import evaluation_number


class TrialProgress:
    """The trainer state of one trial. transformers' `DefaultFlowCallback` decides what is due.

    Args:
        rule: how the trial's evaluations are compared.
        state: the trainer state of the checkpoint that the trial resumes from; None for a new trial.
    """

    def __init__(
        self, args: SFTConfig, order: Order, rule: EvaluationRule, state: TrainerState | None = None
    ) -> None:
        self.args, self.order, self.rule = args, order, rule
        if state is None:
            steps = (
                args.max_steps
                if args.max_steps > 0
                else math.ceil(args.num_train_epochs * order.steps_per_epoch)
            )
            state = TrainerState(max_steps=steps)
            state.compute_steps(args, steps)
        self.state = state
        self._control, self._flow = TrainerControl(), DefaultFlowCallback()

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return int(self.state.global_step)

    @property
    def max_steps(self) -> int:
        return int(self.state.max_steps)

    @property
    def ended(self) -> bool:
        return self.step >= self.max_steps or self.rule.out_of_patience(self.state.log_history)

    @property
    def evaluation_due(self) -> bool:
        return bool(self._control.should_evaluate)

    @property
    def log_due(self) -> bool:
        return bool(self._control.should_log)

    @property
    def evaluation_number(self) -> int:
        """The number of the evaluation at the present step, counted from 1 over the whole run."""
        numbers = vars(self.state) | {"step": self.state.global_step}
        return evaluation_number(numbers, None if self._evaluates_epochs else self.args.eval_steps)

    @property
    def _evaluates_epochs(self) -> bool:
        return bool(self.args.eval_strategy == IntervalStrategy.EPOCH)

    def end_step(self) -> None:
        """Count an optimizer step, and set `log_due` and `evaluation_due`."""
        state, order = self.state, self.order
        state.global_step += 1
        epochs, steps = divmod(state.global_step, order.steps_per_epoch)
        state.epoch = epochs + steps * order.accumulation / order.batches_per_epoch
        self._control = self._flow.on_step_end(self.args, state, self._control)
        if steps == 0:
            self._control = self._flow.on_epoch_end(self.args, state, self._control)
        # transformers does not evaluate where `max_steps` ends a run within an epoch.
        if self.ended and (steps or not self._evaluates_epochs):
            self._control.should_evaluate = True

    def clear_log_due(self) -> None:
        """Set `log_due` to False, because the log line has been closed."""
        self._control.should_log = False

    def record_evaluation(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Record the metrics of an evaluation that was due; returns `position()`."""
        self._control.should_evaluate = False
        self.state.log_history.append({**metrics, "step": self.step})
        return self.position()

    def position(self) -> dict[str, Any]:
        """The present step, the number of steps of the run and the present epoch, as reports have them."""
        return {"step": self.step, "max_steps": self.max_steps, "epoch": float(self.state.epoch or 0)}
