"""TRL 1.16.0: its fused language-model head."""

from typing import Any

from trl.trainer.utils import add_fused_lm_head as add


def add_fused_lm_head(model: Any) -> None:
    """Let `model(..., fused_lm_head=True)` return log-probabilities of labels without building the logits.

    Experimental: `trl.trainer.utils` is not documented. `SFTTrainer` adds this head to its own model.
    `vlmtune.model.head` also relies on the argument `shift_labels` and on the head calling
    `model.base_model`.
    """
    add(model, outputs=("log_probs", "is_top1"))
