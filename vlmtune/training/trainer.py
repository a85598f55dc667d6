"""`AdapterTrainer`: TRL's SFTTrainer over prepared rows, with vlmtune's order of rows and evaluation loss.

It overrides documented hooks of Trainer and SFTTrainer only. Accelerations are in `model.step`, the batches
in `batches`, the log in `step_log`.
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from vlmtune.data.encoded_example import IGNORED
from vlmtune.evaluation.live_answers import Answered, LiveAnswers
from vlmtune.evaluation.objective import Objective
from vlmtune.model.head import add_positions_argument, log_probs_at_labels
from vlmtune.model.lora import keep_adapter_in_fp32
from vlmtune.model.step import AcceleratedStep, TrainedView
from vlmtune.model.transfer import is_asynchronous, to_device
from vlmtune.training.batches import Batch, BatchStream, WorkerBatches
from vlmtune.training.evaluator import Evaluator
from vlmtune.training.meter import Meter
from vlmtune.training.step_log import StepLog
from vlmtune.training.vision_cache import VisionCache
from vlmtune.training.vision_groups import set_vision_learning_rate


class AdapterTrainer(SFTTrainer):
    """SFTTrainer over prepared rows.

    The class is long because it is the list of Trainer's hooks that are overridden, each a few lines.

    Args:
        model: the frozen base with its adapter.
        accelerated_step: the accelerations of `model`; it runs the micro-batches of a batch.
        batches: the batches of this worker.
        meter: measures and logs the speed of training.
        objective: the metric of answers that is evaluated beside the loss, if any.
        live: the fixed rows that are answered at evaluations for the page of a search, if any.
        vision_learning_rate: learning rate of trained weights outside the language model; None for
            `args.learning_rate`.
        vision_cache_bytes: memory in bytes that cached vision features may take.

    Attributes:
        live_answers: the answers to the fixed rows at the last evaluation.
    """

    args: SFTConfig
    model: Any

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        processor: Any,
        *,
        accelerated_step: AcceleratedStep,
        batches: WorkerBatches,
        meter: Meter,
        objective: Objective | None,
        vision_cache_bytes: float,
        live: LiveAnswers | None = None,
        vision_learning_rate: float | None = None,
    ) -> None:
        self.vision_learning_rate = vision_learning_rate
        # SFTTrainer needs datasets for its checks; the batches come from `get_train_dataloader`. SFTTrainer
        # casts adapters on a quantized base to bf16, in which small updates are rounded away.
        with keep_adapter_in_fp32(model):
            super().__init__(
                model,
                args=args,
                processing_class=processor,
                train_dataset=Dataset.from_dict({"input_ids": [[0]] * batches.order.rows}),
                eval_dataset=Dataset.from_dict({"input_ids": [[0]]}),
                data_collator=lambda batch: {"batch": batch},
            )
        # `log_probs_at_labels` computes logits at the labelled positions alone.
        add_positions_argument(accelerated_step.base)
        # `model_wrapped` is what the Trainer's loop calls `train()`, `zero_grad()` and `training_step` with.
        # Where it is set, the Trainer does not wrap the model in DistributedDataParallel: gradients are
        # averaged once a step instead, in `training_step`. So a worker that runs out of memory can repeat its
        # batch while the others wait, and no hook of DistributedDataParallel is in a captured CUDA graph.
        self.accelerator.prepare_model(
            model, evaluation_mode=True
        )  # with evaluation_mode it only adds autocast
        self.model_wrapped = TrainedView(model)  # the model without its frozen parts, for the loop
        # The loss is divided by the labelled tokens of the whole step; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.accelerated_step, self.batches, self.meter = accelerated_step, batches, meter
        autocast = self.compute_loss_context_manager
        self.vision = VisionCache(
            accelerated_step.base, batches, max_bytes=vision_cache_bytes, note=meter.note, autocast=autocast
        )
        accelerated_step.free_memory = self.vision.disable
        self.evaluator = Evaluator(
            model, processor, accelerated_step, self.vision, batches, objective, live, autocast
        )
        self.live_answers: Answered = []
        gather, filter_nan = self.accelerator.gather, args.logging_nan_inf_filter
        self.step_log = StepLog(args.device, log=self.log, gather=gather, filter_nan=filter_nan)
        self.add_callback(self.step_log)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.vision_learning_rate is not None:
            set_vision_learning_rate(optimizer, self.model, self.vision_learning_rate)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        stream = BatchStream(self.batches, self.args.max_length, self.meter.timed)
        return DataLoader(stream, batch_size=None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The batches of a step, and its number of labelled tokens, counted on the CPU where the batches are.

        With `average_tokens_across_devices` the tokens are summed over all workers.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        labelled_tokens = torch.stack(
            [(batch["labels"][..., 1:] != IGNORED).sum() for batch in batches]
        ).sum()
        if self.batches.order.world_size > 1 and self.args.average_tokens_across_devices:
            labelled_tokens = torch.as_tensor(
                self.accelerator.gather(to_device(labelled_tokens, device)[None])
            ).sum()
        return batches, labelled_tokens

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradients of one batch, and return its loss.

        After the last batch of a step the gradients are averaged over the workers.
        """
        self.meter.begin()
        loss = self.add_gradients(model, inputs, num_items_in_batch)
        self.step_log.count_loss(loss, self.state.global_step)
        if self.accelerator.sync_gradients:
            self.accelerated_step.average_gradients(self.batches.order.world_size)
            self.step_log.norm = self.accelerated_step.gradient_norm(self.accelerator.scaler)
        self.step_log.flush()  # log of the step before, while the device computes this one
        self.meter.count(rows=len(inputs["input_ids"]), tokens=int(inputs["attention_mask"].sum()))
        return loss

    def add_gradients(self, model: Any, inputs: Batch, labelled_tokens: Any) -> torch.Tensor:
        """Add this worker's gradients of a batch, in micro-batches, and return its part of the loss.

        The loss of each micro-batch is divided by the `labelled_tokens` of the whole step. So the losses of
        micro-batches add up to the loss of the step, whatever their number.
        """
        parent_step: Any = super().training_step

        def run(part: Batch) -> torch.Tensor:
            return torch.as_tensor(parent_step(model, self.vision.inputs(part), labelled_tokens))

        self.vision.add(inputs)
        return self.accelerated_step.accumulate_gradients(inputs, run)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The summed loss of the batch's labelled tokens, divided by the labelled tokens of the whole step.

        SFTTrainer's `compute_loss` gathers metrics from all workers in every call. Workers may make different
        numbers of calls, because a worker that runs out of memory splits its batch. A gather would
        then wait forever.
        """
        outputs = log_probs_at_labels(self.model, inputs)
        losses = -outputs.log_probs  # zero where there is no label
        if self.args.loss_type == "dft":  # as in TRL: https://huggingface.co/papers/2508.05629
            losses = losses * outputs.log_probs.exp().detach()
        self.step_log.count_tokens(outputs.is_top1.sum(), outputs.label_mask.sum())
        # A worker without rows in this step still takes part; it has no labelled token.
        labelled_tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss: torch.Tensor = losses.sum() / to_device(labelled_tokens, losses.device)
        if not loss.requires_grad:  # adapters on cross-attention alone, and no row has an image
            loss.requires_grad_()
        # Gradients are averaged over the workers, so each worker's loss is multiplied by their number.
        return loss * self.batches.order.world_size if self.args.average_tokens_across_devices else loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The loss on the whole evaluation set and the metric of answers, both by `Evaluator`."""
        self.step_log.flush()
        if is_asynchronous(self.args.device):
            torch.cuda.synchronize(self.args.device)  # finish training, which must not count as evaluation
        started = time.monotonic()
        training = self.model.training
        self.model_wrapped.eval()
        loss = self.evaluator.loss(self.args.per_device_eval_batch_size)
        scored = self.evaluator.score_answers(last=self.state.global_step >= self.state.max_steps)
        self.live_answers = self.evaluator.live_answers(scored)
        seconds = time.monotonic() - started
        self.meter.pause(seconds)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            **scored.metrics,
            f"{metric_key_prefix}_seconds": seconds,
        }
        self.log(
            dict(metrics)
        )  # in evaluation mode: in training mode, TRL would add the averages of training
        self.model_wrapped.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.meter.log(logs, self.state.global_step, self.state.max_steps)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers would traverse all weights in every step; `Meter` has its own estimate."""
        return 0

    def store_flos(self) -> None:
        """Do nothing: `floating_point_ops` is 0, and a sum over the workers would wait for the device."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: checkpoints need no model card, and the finished adapter gets vlmtune's."""
