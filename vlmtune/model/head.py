"""TRL's fused language-model head, applied only at positions that have labels.

On a GPU the head finds these positions itself. On other devices it scores every position, and most have no
label: those of a question or an image.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vlmtune.data.encoded_example import IGNORED

POSITIONS_MULTIPLE = 8  # the number of positions is a multiple of this, so that it seldom changes


def label_scores(model: Any, batch: dict[str, Tensor]) -> Any:
    """The scores of a batch's labels: TRL's output with `log_probs`, `is_top1` and `label_mask`, each [B, K].

    The first two are zero where there is no label. K is the number of positions at which any row of the
    batch has a label, and a few more.

    Args:
        model: has TRL's fused head and was given to `score_positions`.
    """
    labels = batch["labels"]
    if labels.is_cuda:
        return model(**batch, use_cache=False, fused_lm_head=True)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    shifted = labels[:, 1:]
    labelled = (shifted != IGNORED).any(0).nonzero().squeeze(1)
    missing = -len(labelled) % POSITIONS_MULTIPLE if len(labelled) else POSITIONS_MULTIPLE
    others = (shifted == IGNORED).all(0).nonzero().squeeze(1)[:missing]
    positions = torch.cat([labelled, others]).sort().values
    return model(
        **inputs,
        shift_labels=shifted[:, positions],
        positions=positions,
        use_cache=False,
        fused_lm_head=True,
    )


def score_positions(base: Any) -> None:
    """Let the head of `base` take the hidden states at an argument `positions` alone, in place."""
    backbone = base.base_model
    forward_all = backbone.forward

    @wraps(forward_all)
    def forward(*args: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = forward_all(*args, **kwargs)
        if positions is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, positions]
        return outputs

    backbone.forward = forward
