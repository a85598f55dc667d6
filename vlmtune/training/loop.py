"""What one worker does: load the base, attach the adapter, train it with TRL's SFTTrainer, evaluate, report.

The loop reaches the world through two callables. `rows(split, micro_batches, max_length)` gives the batches that were asked for, in
order; `report(metrics, checkpoint_folder)` takes a result. Whether Ray is behind them is not its business.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging as transformers_logging
from trl.trainer.sft_trainer import SFTTrainer

from vlmtune.config import Settings, TrainingArguments
from vlmtune.data.order import MicroBatch, Order, evaluation_order
from vlmtune.data.preflight import fitting_rows
from vlmtune.data.processor import load_processor
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.model.base import load_base
from vlmtune.model.lora import attach, kept_in_fp32, lora_config, target_modules
from vlmtune.training.report import Meter

Batch = dict[str, torch.Tensor]
Report = Callable[[dict[str, Any], str], None]


class Rows(Protocol):
    """Gives micro-batches of a split, cut to `max_length` tokens, in exactly the order asked for."""

    def __call__(self, split: str, batches: Sequence[MicroBatch], max_length: int | None) -> Iterator[Batch]: ...


def train(
    values: dict[str, Any],
    store: Store,
    *,
    rows: Rows,
    report: Report,
    work_dir: str,
    runs_dir: str | None = None,
    rank: int = 0,
    world: int = 1,
    checkpoint: str | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Any:
    """Train one adapter from settings given as plain values; returns the trained model, or None where nothing was left to do.

    Args:
        values: `Settings.to_dict()`.
        work_dir: local folder for checkpoints.
        runs_dir: where rank 0 writes TensorBoard events.
        checkpoint: a checkpoint folder of an earlier run of the same settings to go on from, at the exact next row.
        progress: called with the numbers of each logged step.

    Raises:
        DataError: a row for training does not fit `max_length`, and `on_long_row` is not "skip".
    """
    if checkpoint is not None and _ended(checkpoint):
        return None  # its last report has been made
    transformers_logging.disable_progress_bar()
    settings = Settings.from_dict(values)
    args = training_arguments(settings, work_dir)
    kept = fitting_rows(store, args.max_length, settings.data.on_long_row)
    model = adapted_model(settings, args)
    name, revision = settings.model.base_model, settings.model.model_revision
    processor = load_processor(name, revision=revision, trust_remote_code=args.trust_remote_code)
    order = Order(
        rows=len(kept),
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world=world,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    meter = Meter(runs_dir if rank == 0 else None, progress)
    trainer = AdapterTrainer(
        model, args, processor, store, order, kept=kept, rank=rank, rows=rows, meter=meter, first_step=_state(checkpoint)["global_step"]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ReportAtEvaluation(meter, report))
    trainer.train(resume_from_checkpoint=checkpoint)
    meter.close()
    return model


def training_arguments(settings: Settings, work_dir: str) -> TrainingArguments:
    """TRL's own configuration, built on the machine that trains: its device and precision are this machine's."""
    gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    bf16 = settings.get("bf16")
    return TrainingArguments(
        **{
            **settings.training,
            "output_dir": work_dir,
            "use_cpu": not gpu,
            "bf16": (gpu and torch.cuda.is_bf16_supported()) if bf16 is None else bf16,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "disable_tqdm": True,
            "report_to": "none",
        }
    )


def adapted_model(settings: Settings, args: TrainingArguments) -> Any:
    """The frozen base of the settings with a new adapter, on this worker's device."""
    model = settings.model
    base = load_base(
        model.base_model,
        quantization=model.base_quantization,
        dtype=model.dtype,
        device=args.device,
        revision=model.model_revision,
        nested_quant=model.use_bnb_nested_quant,
        llm_int8=model.llm_int8,
        attn_implementation=model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    targets = target_modules(base, model.lora_target_modules, lora_vision=model.lora_vision)
    config = lora_config(
        base,
        r=model.lora_r,
        alpha=model.lora_alpha,
        dropout=model.lora_dropout,
        target_modules=targets,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        modules_to_save=model.lora_modules_to_save,
    )
    return attach(base, config, seed=args.seed)


def _state(checkpoint: str | None) -> dict[str, Any]:
    """The Trainer's state in a checkpoint: its `global_step` optimizer steps of `max_steps`."""
    if checkpoint is None:
        return {"global_step": 0}
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state


def _ended(checkpoint: str) -> bool:
    """Whether the run of a checkpoint had done all its steps. The Trainer itself would do one more."""
    state = _state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])


class BatchStream(IterableDataset):  # type: ignore[type-arg]
    """The training batches of one rank; each pass over it is the next epoch.

    When a run is resumed, the Trainer throws away the batches that the checkpoint has seen. Those are yielded empty and never read.
    """

    def __init__(self, order: Order, rank: int, first_step: int, fetch: Callable[[list[MicroBatch]], Iterator[Batch]]) -> None:
        self.order, self.rank, self.fetch = order, rank, fetch
        self.epoch, self.first_step = divmod(first_step, order.steps_per_epoch)

    def __len__(self) -> int:
        return self.order.micro_batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, first_step = self.epoch, self.first_step
        self.epoch, self.first_step = epoch + 1, 0
        yield from ({} for _ in range(first_step * self.order.accumulation))
        yield from self.fetch(self.order.epoch(epoch, self.rank, first_step))


class AdapterTrainer(SFTTrainer):
    """SFTTrainer over prepared rows: our order, our evaluation loss, fp32 adapters."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        processor: Any,
        store: Store,
        order: Order,
        *,
        kept: np.ndarray,
        rank: int,
        rows: Rows,
        meter: Meter,
        first_step: int,
    ) -> None:
        # SFTTrainer wants a dataset to look at; the batches come from `get_train_dataloader`. It casts adapters on a quantised base to
        # bf16, where small updates round away.
        with kept_in_fp32(model):
            super().__init__(
                model,
                args=args,
                processing_class=processor,
                train_dataset=Dataset.from_dict({"input_ids": [[0]] * order.rows}),
                eval_dataset=Dataset.from_dict({"input_ids": [[0]]}),
                data_collator=lambda batch: {"batch": batch},
            )
        self.store, self.order, self.kept, self.rank, self.rows, self.meter = store, order, kept, rank, rows, meter
        self.first_step, self.max_length = first_step, args.max_length
        self.adapted = model

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        def fetch(batches: list[MicroBatch]) -> Iterator[Batch]:
            among_all = [replace(batch, rows=tuple(int(self.kept[row]) for row in batch.rows)) for batch in batches]
            return self.meter.timed(self.rows(TRAIN, among_all, self.max_length))

        return DataLoader(BatchStream(self.order, self.rank, self.first_step, fetch), batch_size=None)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        on_device: Batch = super()._prepare_inputs(inputs)
        return self.store.meta.pixels.normalize(on_device, self.adapted.dtype)

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.meter.count(rows=len(inputs["input_ids"]), tokens=int(inputs["attention_mask"].sum()))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        return loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Summed negative log-likelihood of all labelled tokens over their number, on the whole evaluation set at full length.

        So its value does not depend on batch size, `max_length` or the number of workers.
        """
        started = time.monotonic()
        rows = len(self.store.rows_of(EVAL))
        batches = evaluation_order(rows, self.args.per_device_eval_batch_size, self.rank, self.order.world)
        training = self.adapted.training
        self.adapted.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.rows(EVAL, batches, None):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.adapted(**inputs, use_cache=False, fused_lm_head=True)
            total += torch.stack([-outputs.log_probs.double().sum(), outputs.label_mask.sum().double()])
        if self.order.world > 1:
            dist.all_reduce(total)
        seconds = time.monotonic() - started
        self.meter.pause(seconds)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item(), f"{metric_key_prefix}_seconds": seconds}
        self.log(dict(metrics))  # in evaluation mode, or TRL would add the averages of training to it
        self.adapted.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.meter.log(logs, self.state.global_step, self.state.max_steps)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints need no card; the finished adapter gets its own."""


class ReportAtEvaluation(TrainerCallback):
    """Evaluate at the last step too, save after each evaluation, and report both together."""

    def __init__(self, meter: Meter, report: Report) -> None:
        self.meter, self.report = meter, report
        self.metrics: dict[str, float] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:  # else the epoch's end does it
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        self.metrics = kwargs["metrics"]
        control.should_save = True
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress = {"step": state.global_step, "max_steps": state.max_steps, "epoch": float(state.epoch or 0)}
        self.report({**self.metrics, **progress, **self.meter.summary()}, f"{args.output_dir}/checkpoint-{state.global_step}")
