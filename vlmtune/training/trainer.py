"""TRL's SFTTrainer over prepared rows: our order, our evaluation loss, float32 adapters, and steps that
shrink when memory runs out."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_pt_utils import nested_gather
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from vlmtune.data.collate import split_batch
from vlmtune.data.encoded_example import IGNORED
from vlmtune.data.order import MicroBatch, Order, evaluation_order
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import Read
from vlmtune.evaluation.objective import Objective
from vlmtune.model.capture import stop_recording
from vlmtune.model.fast import without_walks
from vlmtune.model.head import label_scores, score_positions
from vlmtune.model.lora import kept_in_fp32
from vlmtune.model.memory import Plan
from vlmtune.model.transfer import OnTheWay, runs_ahead, to_device
from vlmtune.training.report import Meter

Batch = dict[str, torch.Tensor]


class Rows(Protocol):
    """Gives micro-batches of a split, cut to `max_length` tokens, in exactly the order asked for."""

    def __call__(
        self, split: str, batches: Sequence[MicroBatch], max_length: int | None
    ) -> Iterator[Batch]: ...


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    """Average the gradients over the workers, in one message. One that no worker has stays absent, so its
    weight is left alone.

    Waits for the device only on a worker that lacks a gradient, as of cross-attention in a step whose rows
    have no picture.
    """
    there = [parameter.grad is not None for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    counts = to_device(torch.tensor(there, dtype=parameters[0].dtype), parameters[0].device)
    flat = torch.cat(
        [*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters), counts]
    )
    dist.all_reduce(flat)
    *gradients, counts = flat.div_(world).split([*sizes, len(parameters)])
    somewhere = there if all(there) else counts.tolist()
    for parameter, gradient, used in zip(parameters, gradients, somewhere, strict=True):
        parameter.grad = gradient.view_as(parameter) if used else None


@dataclass(frozen=True)
class Logged:
    """What is logged of a step.

    Attributes:
        numbers: its loss, gradient norm, and tokens that were right and labelled; loss and tokens are those
        of `steps` steps.
    """

    numbers: OnTheWay
    learning_rate: float
    steps: int


class BatchStream(IterableDataset):  # type: ignore[type-arg]
    """The training batches of one rank; each pass over it is the next epoch.

    When a run is resumed, the Trainer throws away the batches that the checkpoint has seen. Those are
    yielded empty and never read.
    """

    def __init__(
        self, order: Order, rank: int, first_step: int, fetch: Callable[[list[MicroBatch]], Iterator[Batch]]
    ) -> None:
        self.order, self.rank, self.fetch = order, rank, fetch
        self.epoch, self.first_step = divmod(first_step, order.steps_per_epoch)

    def __len__(self) -> int:
        return self.order.micro_batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, first_step = self.epoch, self.first_step
        self.epoch, self.first_step = epoch + 1, 0
        yield from ({} for _ in range(first_step * self.order.passes_per_step))
        yield from self.fetch(self.order.epoch(epoch, self.rank, first_step))


class AdapterTrainer(SFTTrainer):
    """SFTTrainer over prepared rows: our order, our evaluation loss, fp32 adapters."""

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        processor: Any,
        store: Store,
        order: Order,
        *,
        kept: np.ndarray,
        rank: int,
        rows: Rows,
        meter: Meter,
        first_step: int,
        plan: Plan,
        objective: Objective | None,
        read: Read,
    ) -> None:
        # SFTTrainer wants a dataset to look at; the batches come from `get_train_dataloader`. It casts
        # adapters on a quantised base to
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
        score_positions(model.get_base_model())
        # No DistributedDataParallel: gradients are averaged once a step, here. A worker that runs out of
        # memory tries again while the
        # others wait, and nothing holds on to parameters while a step is recorded.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.store, self.order, self.kept, self.rank, self.rows, self.meter = (
            store,
            order,
            kept,
            rank,
            rows,
            meter,
        )
        self.first_step, self.max_length = first_step, args.max_length
        self.objective: Objective | None = objective
        self.read: Read = read
        self.adapted, self.micro_batch, self.evaluated_at_once = (
            model,
            plan.micro_batch,
            plan.evaluated or args.per_device_eval_batch_size,
        )
        self.model_accepts_loss_kwargs = (
            True  # the loss is divided by the whole step here, so the Trainer must not do it again
        )
        self.loss_type = str(args.loss_type)
        self.answered = torch.zeros(
            2, dtype=torch.int64, device=args.device
        )  # tokens: right, labelled; since the last log
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable = torch.nn.ParameterList(self.trained)
        self.recorded: Logged | None = None
        without_walks(model, self.trained)

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        def fetch(batches: list[MicroBatch]) -> Iterator[Batch]:
            among_all = [
                replace(batch, rows=tuple(int(self.kept[row]) for row in batch.rows)) for batch in batches
            ]
            return self.meter.timed(self.rows(TRAIN, among_all, self.max_length))

        return DataLoader(BatchStream(self.order, self.rank, self.first_step, fetch), batch_size=None)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """The labelled tokens of a step, with `average_tokens_across_devices` on all workers: counted on the
        CPU, as they lie there."""
        labelled = torch.stack([(batch["labels"][..., 1:] != IGNORED).sum() for batch in batch_samples]).sum()
        if self.order.world > 1 and self.args.average_tokens_across_devices:
            labelled = torch.as_tensor(self.accelerator.gather(to_device(labelled, device)[None])).sum()
        return labelled

    def floating_point_ops(self, inputs: Any) -> int:
        """None: transformers would count all weights in every step, and add its estimate up over the
        workers; the meter has its own."""
        return 0

    def store_flos(self) -> None:
        """Nothing, see there; each logged step would wait for the device."""

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self.trainable)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self.trainable, grad_norm)  # type: ignore[no-untyped-call]

    def _prepare_input(self, data: Any) -> Any:
        return (
            to_device(data, self.args.device)
            if isinstance(data, torch.Tensor)
            else super()._prepare_input(data)
        )

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        on_device: Batch = super()._prepare_inputs(inputs)
        return self.store.meta.pixels.normalize(on_device, self.adapted.dtype)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of one device batch, `micro_batch` rows at a time; where they do not fit in
        memory, of half as many.

        The loss is divided by the tokens of the whole step, so its parts add up to it, however many they are.
        """
        self.meter.begin()
        loss = self.gradients_of(model, inputs, num_items_in_batch)
        if self.order.world > 1 and self.accelerator.sync_gradients:
            average_gradients(self.trained, self.order.world)
        self._log_recorded()  # the step before, while the device works on this one
        self.meter.count(rows=len(inputs["input_ids"]), tokens=int(inputs["attention_mask"].sum()))
        return loss

    def gradients_of(self, model: Any, inputs: Batch, items: Any) -> torch.Tensor:
        """Add this worker's gradients of a device batch, and return its share of the loss, which is divided
        by `items`."""
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.trained]
        while True:
            try:
                return self._run_parts(model, inputs, items)
            except torch.OutOfMemoryError:
                if not stop_recording(self.adapted):
                    self.micro_batch = self._half(min(self.micro_batch, len(inputs["input_ids"])))
            for parameter, gradient in zip(self.trained, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            torch.cuda.empty_cache()

    def _half(self, size: int) -> int:
        """Half as many rows, and a word about it; within the handling of an error, which is raised again
        where there is but one."""
        if size == 1:
            raise
        half = -(-size // 2)
        self.meter.note(
            f"out of GPU memory with {size} rows at a time: going on with {half}, the step stays the same"
        )
        return half

    def _run_parts(self, model: Any, inputs: Batch, items: Any) -> torch.Tensor:
        step: Any = super().training_step
        losses = [step(model, part, items) for part in split_batch(inputs, self.micro_batch)]
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The summed loss of the labelled tokens over the labelled tokens of the whole step, on all workers.

        SFTTrainer's own gathers its figures from all workers at every call, and they need not make equally
        many: see `training_step`.
        """
        outputs = label_scores(model, inputs)
        losses = -outputs.log_probs  # zero where there is no label
        if self.loss_type == "dft":  # as in TRL: https://huggingface.co/papers/2508.05629
            losses = losses * outputs.log_probs.exp().detach()
        self.answered += torch.stack([outputs.is_top1.sum(), outputs.label_mask.sum()])
        labelled = torch.as_tensor(num_items_in_batch).clamp(
            min=1
        )  # a worker that only keeps step with the others may have none
        loss: torch.Tensor = losses.sum() / to_device(labelled, losses.device)
        if (
            not loss.requires_grad
        ):  # adapters on cross-attention alone, and no row has a picture: a step that changes nothing
            loss.requires_grad_()
        return (
            loss * self.order.world if self.args.average_tokens_across_devices else loss
        )  # gradients are averaged

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Summed negative log-likelihood of all labelled tokens over their number, on the whole evaluation
        set at full length.

        So its value does not depend on batch size, `max_length` or the number of workers.
        """
        if runs_ahead(self.args.device):
            torch.cuda.synchronize(self.args.device)  # what it still has to do is training
        started = time.monotonic()
        rows = len(self.store.rows_of(EVAL))
        batches = evaluation_order(rows, self.args.per_device_eval_batch_size, self.rank, self.order.world)
        training = self.adapted.training
        self.adapted.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.rows(EVAL, batches, None):
            total += self._negative_log_likelihood(batch)
        if self.order.world > 1:
            dist.all_reduce(total)
        answered = {}
        if self.objective is not None:
            last = self.state.global_step >= self.state.max_steps
            answered = self.objective.measure(
                self.adapted,
                self.processing_class,
                self.store,
                self.read,
                last=last,
                rank=self.rank,
                world=self.order.world,
            )
        seconds = time.monotonic() - started
        self.meter.pause(seconds)
        metrics = {
            f"{metric_key_prefix}_loss": (total[0] / total[1]).item(),
            **answered,
            f"{metric_key_prefix}_seconds": seconds,
        }
        self.log(dict(metrics))  # in evaluation mode, or TRL would add the averages of training to it
        self.adapted.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _negative_log_likelihood(self, batch: Batch) -> torch.Tensor:
        """Of a device batch, summed over its labelled tokens; and their number. As many rows at a time as
        fit in memory."""
        while True:
            try:
                total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
                for part in split_batch(batch, self.evaluated_at_once):
                    with torch.no_grad(), self.compute_loss_context_manager():
                        outputs = label_scores(self.adapted, self._prepare_inputs(part))
                    total += torch.stack(
                        [-outputs.log_probs.double().sum(), outputs.label_mask.sum().double()]
                    )
                return total
            except torch.OutOfMemoryError:
                size = min(self.evaluated_at_once, len(batch["input_ids"]))
                if size > 1 or not stop_recording(self.adapted):
                    self.evaluated_at_once = self._half(size)
            torch.cuda.empty_cache()

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *rest: Any, **more: Any
    ) -> None:
        """As transformers does it, but a step is logged when the next one is under way, where the device
        works beside Python.

        To read its numbers at once would leave the device without work until Python has come through the
        rest of the loop.
        """
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self.control.should_log = False
            self._record(tr_loss, grad_norm, more.get("learning_rate"))
        ends = self.state.global_step >= self.state.max_steps
        if (
            self.control.should_evaluate
            or self.control.should_save
            or ends
            or not runs_ahead(self.args.device)
        ):
            self._log_recorded()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **more)

    def _record(self, tr_loss: torch.Tensor, grad_norm: Any, learning_rate: float | None) -> None:
        """Send the numbers of the last step, summed since the last log, on their way."""
        loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, device=loss.device)
        numbers = OnTheWay(torch.cat([torch.stack([loss.double(), norm.double()]), self.answered.double()]))
        tr_loss.zero_()
        self.answered.zero_()
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        self.recorded = Logged(numbers, rate, self.state.global_step - self._globalstep_last_logged)
        self._globalstep_last_logged = self.state.global_step

    def _log_recorded(self) -> None:
        """Log the step that was recorded last, if it has not been."""
        if self.recorded is None:
            return
        recorded, self.recorded = self.recorded, None
        loss, norm, right, labelled = recorded.numbers.tolist()
        self._total_loss_scalar += loss
        logs = {"loss": loss / recorded.steps, "grad_norm": norm, "learning_rate": recorded.learning_rate}
        self.log({**logs, "mean_token_accuracy": right / max(labelled, 1)})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.meter.log(logs, self.state.global_step, self.state.max_steps)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints need no card; the finished adapter gets its own."""
