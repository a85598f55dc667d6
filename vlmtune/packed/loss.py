"""The loss of each row of a packed batch, so that each trial gets the losses of its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.model.head import log_probs_at_labels


@dataclass(frozen=True)
class RowLosses:
    """The summed loss and the number of correctly predicted labels of each row of a packed batch, `[B]`."""

    loss: Tensor
    correct: Tensor


def row_losses(model: Any, batch: dict[str, Tensor], dft: Tensor | None = None) -> RowLosses:
    """The negative log-likelihood of the labels, summed for each row.

    Args:
        model, batch: as for `log_probs_at_labels`.
        dft: bool `[B]`, whether a row's loss is that of Dynamic Fine-Tuning
            (https://huggingface.co/papers/2508.05629); None if no row's is.
    """
    outputs = log_probs_at_labels(model, batch)
    losses = -outputs.log_probs  # [B, K], zero where there is no label
    if dft is not None:
        losses = torch.where(dft.unsqueeze(1), losses * outputs.log_probs.exp().detach(), losses)
    return RowLosses(losses.sum(1, dtype=torch.float32), outputs.is_top1.sum(1))
