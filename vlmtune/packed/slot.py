"""A slot is what an engine keeps of one trial while it trains: adapter, optimizer, position in its rows, log.

It makes the optimizer steps that SFTTrainer would make for the trial alone. An engine has memory for a number
of slots; a trial gets a new one when it joins, and the slot goes with it when it leaves.

`SlotFactory` makes the slots of an engine.
"""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerState

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import EncodedExample, shorten
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.packed.layers import TargetLayer
from vlmtune.packed.packable import check_packable
from vlmtune.packed.packed_batch import PackedRow
from vlmtune.packed.packed_model import PassResult
from vlmtune.packed.packed_result import target_layers
from vlmtune.packed.rows_cursor import RowsCursor
from vlmtune.packed.slot_adapter import AdapterCopy, SlotAdapter
from vlmtune.packed.step_totals import LossLog, StepTotals
from vlmtune.packed.trial_checkpoint import TrialCheckpoint
from vlmtune.packed.trial_progress import TrialProgress
from vlmtune.packed.trial_records import TrialRecords
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.training.adapted_model import adapter_config
from vlmtune.training.batches import order_of_rows
from vlmtune.training.best_evaluation import EvaluationRule
from vlmtune.training.meter import EVALUATION_NUMBER, FIRST_LOSS, first_loss
from vlmtune.training.trl_arguments import training_arguments


class Slot:
    """One trial in an engine: its adapter, optimizer and position in its rows.

    In every round, the engine takes the rows of the slot's next batch, runs them through the base, and gives
    the slot their gradients and losses. The class is long because it joins the parts of that sequence.

    Args:
        store: the prepared rows at the resolution of the trial's images.
        targets: the layers that get the trial's adapter.
        lora_config: PEFT's config of the adapter.
        folder: folder or URI that the trial's checkpoints are written to.
        runs_dir: folder or URI of the trial's TensorBoard events; None writes none.
        checkpoint: local folder of the checkpoint from which the trial resumes, at the next row.
        on_log: called with the numbers of each logged step.
        shard: this process's part of the rows, if several workers train the trial.
        flops_per_token: floating-point operations of training on one token.
        first_number: where the rows of `store` begin among those of all resolutions of the search.

    Raises:
        DataError: a training row does not fit `max_length`, and `on_long_row` is not "skip".
    """

    def __init__(
        self,
        trial_id: str,
        settings: Settings,
        store: Store,
        targets: list[TargetLayer],
        lora_config: LoraConfig,
        *,
        folder: str,
        runs_dir: str | None = None,
        checkpoint: str | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        shard: WorkerShard = SINGLE_WORKER,
        flops_per_token: float = 0.0,
        first_number: int = 0,
    ) -> None:
        self.first_number = first_number
        self.trial_id, self.folder, self.settings, self.shard = trial_id, folder, settings, shard
        self.lora_config = lora_config
        lora_config.inference_mode = True
        lora_config.base_model_name_or_path = settings.model.base_model
        usable_rows = fitting_rows(store, settings.training.max_length, settings.data.on_long_row)
        with tempfile.TemporaryDirectory() as work_dir:  # TRL wants a folder; nothing is written there
            self.args = args = training_arguments(settings, work_dir, checkpointing=False)
        order = order_of_rows(settings, args, store, usable_rows, shard.world_size)
        saved = None
        if checkpoint is not None:
            saved = TrialCheckpoint.read(checkpoint, [target.name for target in targets])
        rule = EvaluationRule.of(settings, len(store.rows_of(EVAL)))
        self.progress = TrialProgress(args, order, rule, saved.state if saved is not None else None)
        self.adapter = SlotAdapter(targets, settings, args, self.progress.max_steps, saved)
        self.cursor = RowsCursor(
            first_number + store.rows_of(TRAIN)[usable_rows],
            order,
            shard,
            first_step=self.progress.step,
            max_steps=self.progress.max_steps,
        )
        self.totals: StepTotals | None = None  # of the step in progress; None before its first batch
        self.log = LossLog()
        self.records = TrialRecords(settings, runs_dir, on_log, flops_per_token)

    def packed_row(self, number: int, example: EncodedExample) -> PackedRow:
        """Row `number` of the store for a packed batch, with the present adapter and without dropout."""
        return PackedRow(
            slot=self,
            number=number,
            example=example,
            adapter=self.adapter.flat,
            scaling=self.adapter.scaling,
        )

    def training_rows(self, examples: dict[int, EncodedExample]) -> list[PackedRow]:
        """The rows of the next batch.

        Args:
            examples: the examples of the whole step, by row number in the store.
        """
        if self.totals is None:
            self.totals = self._begin_step(examples)
        self.records.meter.begin()
        rows = []
        for number, position in zip(self.cursor.next_batch(), self.cursor.positions(), strict=True):
            row = self.packed_row(number, self._shortened(examples[number]))
            self.totals.has_images |= row.has_image
            rows.append(
                replace(
                    row,
                    weight=self.totals.weight,
                    dropout=self.settings.lora.dropout,
                    dropout_key=zlib.crc32(f"{self.args.seed} {self.progress.step} {position}".encode()),
                    dft=self.args.loss_type == "dft",
                )
            )
        return rows

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add the gradient of one row of the batch, `[P]`."""
        self.adapter.add_gradient(gradient)

    def end_batch(self, rows: list[PackedRow], result: PassResult) -> None:
        """Add the batch's losses to the totals; after the last batch of a step, update the adapter."""
        assert self.totals is not None
        self.records.meter.count(rows=len(rows), tokens=sum(row.tokens for row in rows))
        if rows:
            losses, correct = (
                torch.stack(parts) for parts in zip(*(result.rows[id(row)] for row in rows), strict=True)
            )
            self.totals.add(losses, correct)
        if self.cursor.advance():
            self._update(self.totals)
            self.totals = None

    def flush_log(self) -> bool:
        """Write the pending log line, if any; returns False if a loss or norm in it is not finite."""
        line = self.log.read_line()
        if line is None:
            return True
        history = self.progress.state.log_history
        first = {} if history else {FIRST_LOSS: line.first_loss}
        history.append({**line.values, **first, "step": line.step})
        self.records.meter.log(line.values, line.step, self.progress.max_steps)
        return line.finite

    def report(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Record an evaluation; returns the report: `metrics` with the trial's position and rates.

        If the best evaluation counts (`EvaluationRule.load_best`), the report has its numbers instead.
        """
        self.records.meter.log(metrics, self.progress.step, self.progress.max_steps)
        position = self.progress.record_evaluation(metrics)
        number = self.progress.evaluation_number
        first = first_loss(self.progress.state.log_history)
        report = {**metrics, **position, **self.records.meter.summary(), **first, EVALUATION_NUMBER: number}
        return self.progress.rule.judged(report, metrics, self.progress.state.log_history)

    def begin_checkpoint(self) -> PendingCheckpoint:
        """Start to copy the trial's present state to the CPU. Training can continue at once."""
        return PendingCheckpoint(
            self.adapter.begin_copy(), copy.deepcopy(self.progress.state), self.lora_config
        )

    def close(self) -> None:
        self.records.meter.close()

    def _begin_step(self, examples: dict[int, EncodedExample]) -> StepTotals:
        rows = [self._shortened(examples[number]) for number in self.cursor.rest_of_step()]
        labelled_tokens = sum(int((row.labels >= 0).sum()) for row in rows)
        return StepTotals(labelled_tokens, self.adapter.flat.device)

    def _update(self, totals: StepTotals) -> None:
        """Make an optimizer step with the gradients of all rows of the step."""
        optimizer, layout, progress = self.adapter.optimizer, self.adapter.layout, self.progress
        labelled_tokens = totals.all_reduce(
            self.shard, optimizer.gradient, reduce_has_images=layout.image_start < layout.size
        )
        learning_rate = optimizer.learning_rate
        norm = optimizer.step(has_images=totals.has_images)
        progress.end_step()
        self.log.add(totals, norm, labelled_tokens)
        if progress.log_due:
            epoch = float(progress.state.epoch or 0)
            self.log.close_line(learning_rate=learning_rate, epoch=epoch, step=progress.step)
            progress.clear_log_due()

    def _shortened(self, example: EncodedExample) -> EncodedExample:
        return shorten(example, self.settings.training.max_length)


@dataclass(frozen=True)
class PendingCheckpoint:
    """The state of a slot after a step, to be written as a checkpoint."""

    copied: AdapterCopy
    state: TrainerState
    lora_config: LoraConfig

    def write(self, folder: Path, save_processor: Callable[[Path], None]) -> None:
        """Write the checkpoint into a local folder. Call it once; the slot may train in another thread."""
        adapter, optimizer = self.copied.wait()
        self.lora_config.save_pretrained(str(folder))
        save_processor(folder)
        TrialCheckpoint(adapter, optimizer, self.state).write(folder)
        self.copied.release()


class SlotFactory:
    """Makes slots while other trials train. It finds target layers in a model without weights.

    Args:
        settings: the settings of the engine.
        store: with those of the other resolutions that trials may have.
        flops_per_token: floating-point operations of training on one token.
        shard: this process's part of every trial's rows.
    """

    def __init__(self, settings: Settings, store: Store, flops_per_token: float, shard: WorkerShard) -> None:
        self.store, self.flops_per_token, self.shard = store, flops_per_token, shard
        self.meta_model = settings.model.ref.meta_model()

    def make(self, trial_id: str, settings: Settings, **options: Any) -> Slot:
        """Make the slot of a trial. Takes a second or less; any thread may call it.

        Args:
            options: the arguments `folder`, `runs_dir`, `checkpoint` and `on_log` of `Slot`.

        Raises:
            ConfigError: the settings cannot be trained packed.
            DataError: a training row does not fit the trial's `max_length`.
            ModelError: the trial's target modules match no layer.
        """
        check_packable(settings)
        targets, lora_config = self._find_targets(settings)
        resolution = settings.model.resolution
        return Slot(
            trial_id,
            settings,
            self.store.at(resolution),
            targets,
            lora_config,
            shard=self.shard,
            flops_per_token=self.flops_per_token,
            first_number=self.store.first_number(resolution),
            **options,
        )

    def _find_targets(self, settings: Settings) -> tuple[list[TargetLayer], LoraConfig]:
        names, config = adapter_config(settings, self.meta_model)
        return target_layers(self.meta_model, names), config
