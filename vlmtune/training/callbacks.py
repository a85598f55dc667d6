"""What a run does beside its steps: a probe before the first one, and a report with each evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from vlmtune.training.meter import Meter
from vlmtune.training.trainer import AdapterTrainer

Report = Callable[[dict[str, Any], str], None]


class ProbeLongest(TrainerCallback):
    """Before the first step, tries the longest rows together, so that want of memory shows in seconds and
    not in the middle of the run."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        batch = trainer.batches.longest(args.per_device_train_batch_size, args.max_length)
        with torch.random.fork_rng(devices=[args.device]):
            trainer.add_gradients(trainer.model_wrapped, batch, int((batch["labels"] >= 0).sum()))
        trainer.model_wrapped.zero_grad()
        trainer.step_log.reset()


class ReportAtEvaluation(TrainerCallback):
    """Evaluate at the last step too, save after each evaluation, and report both together."""

    def __init__(self, meter: Meter, report: Report) -> None:
        self.meter, self.report = meter, report
        self.metrics: dict[str, float] = {}

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if (
            state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH
        ):  # else the epoch's end does it
            control.should_evaluate = True
        return control

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.metrics = kwargs["metrics"]
        control.should_save = True
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress = {"step": state.global_step, "max_steps": state.max_steps, "epoch": float(state.epoch or 0)}
        self.report(
            {**self.metrics, **progress, **self.meter.summary()},
            f"{args.output_dir}/checkpoint-{state.global_step}",
        )
