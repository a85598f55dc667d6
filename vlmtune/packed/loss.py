"""The loss of each row of a pass, so that every trial has its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.model.head import label_scores


@dataclass(frozen=True)
class RowLosses:
    """For each row of a pass, `[B]`: summed loss and number of correct predictions of its labelled tokens."""

    loss: Tensor
    correct: Tensor


def row_losses(model: Any, batch: dict[str, Tensor], dft: Tensor | None = None) -> RowLosses:
    """Negative log-likelihood of a model with TRL's fused head and `score_positions`, summed for each row.

    Args:
        dft: bool `[B]`, rows whose loss is that of Dynamic Fine-Tuning
            (https://huggingface.co/papers/2508.05629).
    """
    outputs = label_scores(model, batch)
    losses = -outputs.log_probs  # [B, K], zero where there is no label
    if dft is not None:
        losses = torch.where(dft.unsqueeze(1), losses * outputs.log_probs.exp().detach(), losses)
    return RowLosses(losses.sum(1, dtype=torch.float32), outputs.is_top1.sum(1))
