"""Check with a row of the data that a model is causal: that no token attends to later tokens.

A model that is not causal would see the answers that it is trained on, so their loss would mean nothing.
Prefix language models such as PaliGemma attend in both directions over the prompt, and diffusion models over
everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.data.encoded_example import IGNORED
from vlmtune.errors import ModelError
from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory

COMPARED = 8  # positions whose logits are compared: the last token and those before it
# Largest change of logits, relative to their standard deviation, that rounding can cause.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@torch.no_grad()
def check_causal(base: Any, batch: dict[str, Tensor]) -> None:
    """Check that the logits before the last token of a row do not change if that token changes.

    Args:
        batch: the model's inputs for one row, on the model's device.

    Raises:
        ModelError: they change, or the model does not take the inputs that its own processor makes.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][0, -1] = inputs["input_ids"][0, -2]
    training = base.training
    try:
        devices = [base.device] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _quantized_layers_get_floats(base):
            _logits(
                base.train(), inputs
            )  # in training mode Gemma 3n clips weights, which fails if they are quantized
        base.eval()
        first, second = (_logits(base, one) for one in (inputs, changed))
    except LIBRARY_ERRORS as error:
        if lacks_memory(error):
            raise
        raise ModelError(
            f"{base.name_or_path}: the model refuses what its own processor makes of a row: "
            f"{first_line(error)}{_way_out(base)}"
        ) from error
    finally:
        base.train(training)
    difference = float((first - second).abs().max() / first.std().clamp(min=1e-12))
    if not difference <= TOLERANCES[base.dtype]:
        raise ModelError(
            f"{base.name_or_path} attends to later tokens of a row (a prefix language model, or another that "
            "is not causal): it would see the answers that it is trained on, so it cannot be tuned here"
        )


def _quantized_layers(base: Any) -> list[nn.Module]:
    return [
        module
        for module in base.modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    ]


def _way_out(base: Any) -> str:
    """A hint at the end of a message: some model classes fail on quantized weights."""
    return " (--quantization none may do)" if _quantized_layers(base) else ""


@contextmanager
def _quantized_layers_get_floats(base: Any) -> Iterator[None]:
    """In the block, raise a TypeError if a quantized layer gets integers, by a cast to its dtype."""

    def check(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and not args[0].is_floating_point():
            raise TypeError("its class casts images to the type of weights that are quantized")

    handles = [layer.register_forward_pre_hook(check) for layer in _quantized_layers(base)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(base: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at the positions before the last token, `[COMPARED - 1, V]` float32."""
    known = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    kept = {"logits_to_keep": COMPARED} if known else {}
    logits: Tensor = base(**inputs, **kept, use_cache=False).logits
    return logits[0, -COMPARED:-1].float()


def labelled_logits(base: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model class's logits for each labelled token of a batch, `[N, V]` float32, and the N labels."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORED
    logits: Tensor = base(**inputs, use_cache=False).logits
    return logits[:, :-1][labelled].float(), labels[labelled]
