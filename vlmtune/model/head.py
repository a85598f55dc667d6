"""TRL's fused language-model head, at the positions that have labels.

On a GPU it finds them itself. Elsewhere it scores every position, of which most have none: a question, an
image.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vlmtune.data.encoded_example import IGNORED

POSITIONS_MULTIPLE = 8  # positions are taken in multiples, so that their number seldom differs


def label_scores(model: Any, batch: dict[str, Tensor]) -> Any:
    """What TRL's head says of a batch's labels: `log_probs` and `is_top1`, zero where there is no label, and
    `label_mask`.

    Their shape is `[B, K]`: a position is left out where no row of the batch has a label at it. `model`
    needs `score_positions`.
    """
    labels = batch["labels"]
    if labels.is_cuda:
        return model(**batch, use_cache=False, fused_lm_head=True)
    rest = {name: tensor for name, tensor in batch.items() if name != "labels"}
    shifted = labels[:, 1:]
    positions = (shifted != IGNORED).any(0).nonzero().squeeze(1)
    missing = -len(positions) % POSITIONS_MULTIPLE if len(positions) else POSITIONS_MULTIPLE
    others = (shifted == IGNORED).all(0).nonzero().squeeze(1)[:missing]
    positions = torch.cat([positions, others]).sort().values
    return model(
        **rest, shift_labels=shifted[:, positions], positions=positions, use_cache=False, fused_lm_head=True
    )


def score_positions(base: Any) -> None:
    """Let the head of `base` see only the hidden states at `positions`, where these are given, in place."""
    backbone = base.base_model
    whole = backbone.forward

    @wraps(whole)
    def forward(*args: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = whole(*args, **kwargs)
        if positions is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, positions]
        return outputs

    backbone.forward = forward
