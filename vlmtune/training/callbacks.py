"""Trainer callbacks: try the longest rows before the first step, and report each evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from vlmtune.training.best_evaluation import LIVE_ANSWERS, EvaluationRule
from vlmtune.training.meter import Meter, first_loss
from vlmtune.training.trainer import AdapterTrainer

ReportResult = Callable[[dict[str, Any], str], None]  # called with metrics and the folder of their checkpoint


class TryLongestRows(TrainerCallback):
    """Runs the longest rows before the first step, so that too little memory is noticed at once."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        batch = trainer.batches.longest(args.per_device_train_batch_size, args.max_length)
        with torch.random.fork_rng(devices=[args.device]):
            trainer.add_gradients(trainer.model_wrapped, batch, int((batch["labels"] >= 0).sum()))
        trainer.model_wrapped.zero_grad()
        trainer.step_log.reset()


class ReportAtEvaluation(TrainerCallback):
    """Also evaluates at the last step, saves a checkpoint after each evaluation, and reports both together.

    It ends the run if `early_stopping_patience` is exhausted.
    """

    def __init__(
        self, trainer: AdapterTrainer, meter: Meter, report: ReportResult, rule: EvaluationRule
    ) -> None:
        self.trainer, self.meter, self.report, self.rule = trainer, meter, report, rule
        self.metrics: dict[str, float] = {}

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        # With the strategy "epoch", the end of the last epoch evaluates.
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True
        return control

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.metrics = kwargs["metrics"]
        control.should_save = True
        if self.rule.out_of_patience(state.log_history):
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        position = {"step": state.global_step, "max_steps": state.max_steps, "epoch": float(state.epoch or 0)}
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        first = first_loss(state.log_history)
        answers = self.trainer.live_answers
        report: dict[str, Any] = {**self.metrics, **position, **self.meter.summary(), **first}
        report |= {LIVE_ANSWERS: answers} if answers else {}
        self.report(self.rule.judged(report, self.metrics, state.log_history), folder)
