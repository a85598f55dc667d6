"""The training loop of one worker: load the base, attach the adapter, train, evaluate, report.

The loop knows nothing of Ray. Its caller passes two functions: `read_batches(split, batches, max_length)`
returns the batches with these numbers in order, and `report(metrics, checkpoint_folder)` takes the result of
an evaluation.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.order import Order
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.evaluation.check_step import CheckedRows, SelfCheck
from vlmtune.evaluation.live_answers import LiveAnswers
from vlmtune.evaluation.objective import Objective
from vlmtune.evaluation.try_row import try_row
from vlmtune.library_errors import plain_library_errors
from vlmtune.model.memory import StepPlan
from vlmtune.model.vision_features import room_for_features
from vlmtune.trackers.tracker import finish_trackers, open_trackers
from vlmtune.training.adapted_model import adapted_model
from vlmtune.training.batches import BatchReader, WorkerBatches, order_of_rows
from vlmtune.training.best_evaluation import EvaluationRule
from vlmtune.training.callbacks import ReportAtEvaluation, ReportResult, TryLongestRows
from vlmtune.training.meter import Meter, training_flops_per_token
from vlmtune.training.step_plan import length_multiple, plan_step
from vlmtune.training.step_result import step_dtype, step_result
from vlmtune.training.trainer import AdapterTrainer
from vlmtune.training.trl_arguments import training_arguments


def train(
    settings: Settings,
    store: Store,
    *,
    read_batches: BatchReader,
    report: ReportResult,
    work_dir: str,
    runs_dir: str | None = None,
    tracked_dir: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Train one adapter with `AdapterTrainer`.

    Args:
        read_batches: reads batches of a split.
        report: called with the metrics and the checkpoint folder of each evaluation.
        work_dir: local folder for checkpoints.
        runs_dir: the folder where the first worker writes TensorBoard events.
        tracked_dir: the folder or URI that the events are copied to, if it is not `runs_dir`; trackers name
            the run after it.
        rank, world_size: this worker's number, and the number of workers.
        checkpoint: the checkpoint folder of an interrupted run with the same settings, to resume from.
        progress: called with the numbers of each logged step and evaluation, and with {"note": text}.

    Returns:
        The trained model; None if the checkpoint's run had ended already.

    Raises:
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
        DataError: a row for training does not fit `max_length`, and `on_long_row` is not "skip".
    """
    rule = EvaluationRule.of(settings, len(store.rows_of(EVAL)))
    if checkpoint is not None and _ran_to_its_end(checkpoint, rule):
        return None  # the run has made its last report
    transformers_logging.disable_progress_bar()
    usable_rows = fitting_rows(store, settings.training.max_length, settings.data.on_long_row)
    if rank != 0:
        runs_dir = None
    trackers = [] if runs_dir is None else open_trackers(settings, tracked_dir or runs_dir)
    meter = Meter(runs_dir, progress, trackers=trackers)
    plan = plan_step(settings, store, usable_rows, world_size, meter.note)
    args = training_arguments(settings, work_dir, checkpointing=plan.checkpointing)
    record_reference = partial(_record_reference, settings, store, usable_rows, args, plan, meter.note)
    model, accelerated_step, self_check = adapted_model(settings, args, plan, meter.note, record_reference)
    meter.flops_per_token = training_flops_per_token(accelerated_step.base.get_decoder())
    order = order_of_rows(settings, args, store, usable_rows, world_size)
    args.gradient_accumulation_steps = order.batches_per_step
    vision_cache_bytes = 0.0
    if _repeats_rows(args, order):
        vision_cache_bytes = room_for_features(args.device, plan.spare_bytes)
    first_step = 0 if checkpoint is None else _trainer_state(checkpoint)["global_step"]
    with plain_library_errors(str(settings.model.model_name_or_path), "making TRL's SFTTrainer for it"):
        trainer = AdapterTrainer(
            model,
            args,
            settings.model.ref.processor(),
            accelerated_step=accelerated_step,
            batches=WorkerBatches(store, order, usable_rows, rank, read_batches, first_step),
            meter=meter,
            objective=Objective.of(settings),
            live=LiveAnswers.of(settings),
            vision_learning_rate=settings.lora.vision_learning_rate,
            vision_cache_bytes=vision_cache_bytes,
        )
    if self_check is not None:
        run = partial(step_result, trainer, self_check.rows)
        self_check.compare_with_reference(accelerated_step.accelerations, run)
    trainer.remove_callback(PrinterCallback)
    if args.device.type == "cuda":
        trainer.add_callback(TryLongestRows(trainer))
    trainer.add_callback(ReportAtEvaluation(trainer, meter, report, rule))
    trainer.train(resume_from_checkpoint=checkpoint)
    meter.close()
    finish_trackers()
    return model


def _record_reference(
    settings: Settings,
    store: Store,
    usable_rows: np.ndarray,
    args: SFTConfig,
    plan: StepPlan,
    note: Callable[[str], None],
    base: Any,
    targets: list[str],
) -> SelfCheck | None:
    """Check that the loaded base accepts a row and is causal, and run a few rows for the self-check.

    `adapted_model` calls this before the base is accelerated. The accelerated step is compared with the
    results later.
    """
    try_row(base, store, usable_rows, args.max_length)
    rows = CheckedRows.choose(store, usable_rows, args.max_length, length_multiple(settings))
    return SelfCheck.record_reference(settings, base, targets, rows, plan, note, step_dtype(args, base))


def _repeats_rows(args: SFTConfig, order: Order) -> bool:
    """Whether rows are trained on more than once, so that caching their vision features saves time."""
    if args.max_steps > 0:
        return args.max_steps > order.steps_per_epoch
    return args.num_train_epochs > 1


def _trainer_state(checkpoint: str) -> dict[str, Any]:
    """The trainer state in a checkpoint, which has `global_step` and `max_steps` among others."""
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state


def _ran_to_its_end(checkpoint: str, rule: EvaluationRule) -> bool:
    """Whether the run of a checkpoint had ended. If resumed, the Trainer would make one more step."""
    state = _trainer_state(checkpoint)
    return state["global_step"] >= state["max_steps"] or rule.out_of_patience(state["log_history"])
