"""The losses and gradients of some rows in a training step, for the self-check."""

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from vlmtune.evaluation.check_step import CheckedRows
from vlmtune.model.capture import WARM_UP_CALLS
from vlmtune.model.head import log_probs_at_labels
from vlmtune.model.lora import ADAPTER
from vlmtune.model.self_check import StepResult, without_dropout
from vlmtune.training.trainer import AdapterTrainer


def step_dtype(args: SFTConfig, base: Any) -> torch.dtype:
    """The dtype in which a step with these arguments computes."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else base.dtype


def step_result(trainer: AdapterTrainer, rows: CheckedRows, places: Sequence[int]) -> StepResult:
    """Losses and gradients of rows in one batch. Afterwards, no parameter has a gradient.

    If steps are captured, the result is that of a replay. The graphs are then discarded, because they were
    captured without dropout.

    Args:
        rows: the rows of the self-check.
        places: indices, among `rows`, of the rows to compute.
    """
    step = trainer.accelerated_step
    batch = rows.batch(step.base, [rows.examples[place] for place in places])
    losses = torch.zeros(len(places))
    with without_dropout(step.base):
        for _ in range(WARM_UP_CALLS + 2 if step.captures_graphs else 1):
            _clear(step.trained)
            losses = _forward_and_backward(trainer, batch)
    gradients = {}
    for name, layer in step.base.named_modules():
        if ADAPTER in getattr(layer, "lora_B", {}):
            weight = layer.lora_B[ADAPTER].weight
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients[name] = gradient / layer.scaling[ADAPTER]
    _clear(step.trained)
    step.discard_all_graphs()
    return StepResult(losses, gradients)


def _forward_and_backward(trainer: AdapterTrainer, batch: Any) -> torch.Tensor:
    """The losses of a batch's rows, without their graph.

    A graph that lives on keeps autograd's nodes of the trained tensors, and with them the stream that they
    were made on. CUDA refuses to capture a backward pass that waits for that stream.
    """
    losses: torch.Tensor
    with trainer.compute_loss_context_manager():
        losses = -log_probs_at_labels(trainer.model, batch).log_probs.float().sum(1)
    if losses.requires_grad:
        losses.sum().backward()
    return losses.detach()


def _clear(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
