"""The check on a row of the data that a token sees no later ones: else a model would see its answers.

Prefix language models such as PaliGemma attend both ways over all that their processor calls the prompt, and
diffusion models over everything. The loss of an answer that is seen means nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vlmtune.errors import ModelError

COMPARED = 8  # positions before the last token
# Largest change of logits, relative to their spread, that rounding explains.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@torch.no_grad()
def check_causal(base: Any, batch: dict[str, Tensor]) -> None:
    """Change the last token of one row, and see whether the logits before it change.

    Args:
        batch: the model's inputs for one row, on its device.

    Raises:
        ModelError: they change, or the model does not take what its own processor makes of the row.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][0, -1] = inputs["input_ids"][0, -2]
    training = base.training
    try:
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            _logits(base.train(), inputs)  # Gemma 3n clips weights then, which fails on quantised ones
        base.eval()
        first, second = (_logits(base, one) for one in (inputs, changed))
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{base.name_or_path}: the model refuses what its own processor makes of a row: {line}"
        ) from error
    finally:
        base.train(training)
    difference = float((first - second).abs().max() / first.std().clamp(min=1e-12))
    if not difference <= TOLERANCES[base.dtype]:
        raise ModelError(
            f"{base.name_or_path} attends to later tokens of a row (a prefix language model, or another that "
            "is not causal): it would see the answers that it is trained on, so it cannot be tuned here"
        )


def _logits(base: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`[COMPARED - 1, V]` float32, before the last token."""
    known = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    kept = {"logits_to_keep": COMPARED} if known else {}
    logits: Tensor = base(**inputs, **kept, use_cache=False).logits
    return logits[0, -COMPARED:-1].float()
