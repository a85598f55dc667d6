"""Changes that make a training step faster without changing its result, for any model with a decoder.

- `lean_lora`: LoRA is computed in the dtype of the activations, without PEFT's casts of whole activations.
- `disable_vision_gradient`: a vision tower that is not trained runs without gradient and keeps no
activations. - `disable_autocast`: the whole model computes in the base's own dtype, without autocast to
float32 in norms. - `skip_padding_mask`: causal attention gets no padding mask, so that it can use its fastest
kernel. - `compile_layers`: each decoder layer is compiled with `torch.compile`.

Each function changes a model in place. `vlmtune.model.step.AcceleratedStep` applies them.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.compat.transformers import config_without_padding_mask, run_checkpointed
from vlmtune.model.acceleration import Acceleration
from vlmtune.model.offload import OffloadedCheckpoints

# Layers are compiled again for training, evaluation and each batch size, first for a fixed length, then for
# any length. torch's default limit is 8.
RECOMPILE_LIMIT = 64


class LeanLora:
    """A LoRA layer that computes `base(x) + scaling * B A dropout(x)` in the dtype of `base(x)`.

    PEFT casts `x` to the adapter's float32 first, so that each activation is written and read at twice its
    size. This class casts the adapter's two small matrices instead.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        name = self.active_adapters[0]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged_adapters or name not in self.lora_A:
            return y
        a = self.lora_A[name].weight.to(y.dtype)
        b = (self.lora_B[name].weight * self.scaling[name]).to(y.dtype)
        return y + nn.functional.linear(nn.functional.linear(self.lora_dropout[name](x.to(y.dtype)), a), b)


class LeanLinear(LeanLora, PeftLinear):
    """`LeanLora` on a plain linear layer."""


class LeanLinear4bit(LeanLora, PeftLinear4bit):
    """`LeanLora` on a linear layer in 4 bits."""


class LeanLinear8bit(LeanLora, PeftLinear8bit):
    """`LeanLora` on a linear layer in 8 bits."""


LEAN_CLASSES: dict[type, type] = {
    PeftLinear: LeanLinear,
    PeftLinear4bit: LeanLinear4bit,
    PeftLinear8bit: LeanLinear8bit,
}


def lean_lora(model: PeftModel) -> Acceleration:
    """Make PEFT's LoRA layers compute as `LeanLora` does, with one active adapter at a time.

    Layers with DoRA or a bias keep PEFT's computation.
    """
    changed = [
        (module, type(module))
        for module in model.modules()
        if type(module) in LEAN_CLASSES
        and isinstance(module, LoraLayer)
        and not module.lora_variant
        and not any(module.lora_bias.values())
    ]

    def apply(on: bool) -> None:
        for module, kind in changed:
            module.__class__ = LEAN_CLASSES[kind] if on else kind  # only `forward` differs

    apply(True)
    return Acceleration("LoRA in the activations' dtype", apply)


def disable_vision_gradient(model: PreTrainedModel) -> None:
    """Run vision tower and projector without gradient, if they have no trained parameter.

    Gradient checkpointing makes all input embeddings require a gradient, also the vision tower's. The tower
    would then run twice and have a backward pass.
    """
    vision_parts = decoder_and_other_parts(model)[1:]
    if not any(parameter.requires_grad for part in vision_parts for parameter in part.parameters()):
        for part in vision_parts:
            part.forward = torch.no_grad()(part.forward)


def disable_autocast(model: PeftModel) -> bool:
    """Run the model without autocast, in the base's dtype, if only `LeanLora` layers are trained.

    Returns:
        Whether that was possible.
    """
    trains_other = any(
        ".lora_" not in name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    has_other_layers = any(
        isinstance(module, LoraLayer) and type(module) not in LEAN_CLASSES.values()
        for module in model.modules()
    )
    if trains_other or has_other_layers:
        return False
    base: Any = model.get_base_model()
    for part in decoder_and_other_parts(base):
        part.forward = torch.autocast(model.device.type, enabled=False)(part.forward)
    return True


def decoder_and_other_parts(model: PreTrainedModel) -> list[Any]:
    """The decoder, followed by the other parts of the model: vision tower and projector."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    for parent in model.modules():
        if decoder in parent.children():
            return [decoder, *(child for child in parent.children() if child not in (decoder, head))]
    return [decoder]


def skip_padding_mask(model: PreTrainedModel) -> Acceleration:
    """Do not mask padding in the decoder's attention, because training batches are padded on the right.

    In causal attention no token attends to a later one, so a token with a label never attends to padding.
    While the decoder makes its attention masks, it has a copy of its config that turns the padding mask off.
    A call keeps its padding mask if it has a cache (generation, which pads on the left), position ids `[B,
    T]`, or a mask of four dimensions. Multimodal position ids `[3, B, T]` come from the model itself.
    """
    acceleration = Acceleration("attention without padding mask")
    decoder = model.get_decoder()
    forward_with_mask = decoder.forward

    @wraps(forward_with_mask)
    def forward(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if (
            not acceleration.on
            or not isinstance(mask, Tensor)
            or mask.ndim != 2
            or kwargs.get("past_key_values") is not None
            or _one_axis(kwargs.get("position_ids"))
        ):
            return forward_with_mask(*args, **kwargs)
        config = decoder.config
        decoder.config = config_without_padding_mask(config)
        try:
            return forward_with_mask(*args, **kwargs)
        finally:
            decoder.config = config

    decoder.forward = forward
    return acceleration


def _one_axis(position_ids: Tensor | None) -> bool:
    return position_ids is not None and position_ids.ndim < 3


def compile_layers(
    model: PreTrainedModel, *, compiled: bool = True, checkpoints: OffloadedCheckpoints | None = None
) -> Acceleration:
    """Compile the decoder's layers with `torch.compile`. The first steps then take half a minute.

    Compiling fuses norms, rotary embeddings, activations, casts and LoRA's additions. Layers of one class
    share their compiled code. With gradient checkpointing, the code inside a checkpoint is compiled.

    Args:
        compiled: whether to compile; if not, only the way of checkpointing is changed.
        checkpoints: stores the layers' inputs in place of torch's gradient checkpoints.
    """
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    torch.compiler.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
    acceleration = Acceleration("compiled layers")
    code: dict[type, Any] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        kind = type(layer)
        uncompiled = getattr(kind.forward, "__wrapped__", kind.forward)  # without transformers' checkpointing
        if kind not in code:
            code[kind] = torch.compile(uncompiled) if compiled else uncompiled
        run = partial(_run_layer, acceleration, code[kind], uncompiled, layer)
        layer.forward = partial(_maybe_checkpointed, layer, run, checkpoints, index == 0)
    return acceleration


def _run_layer(acceleration: Acceleration, compiled: Any, uncompiled: Any, *args: Any, **kwargs: Any) -> Any:
    return (compiled if acceleration.on else uncompiled)(*args, **kwargs)


def _maybe_checkpointed(
    layer: Any,
    run: Any,
    checkpoints: OffloadedCheckpoints | None,
    first: bool,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not (layer.gradient_checkpointing and layer.training):
        return run(x, *args, **kwargs)
    if checkpoints is not None and x.is_cuda:
        return checkpoints.run(lambda x: run(x, *args, **kwargs), x, first=first)
    return run_checkpointed(layer, partial(run, **kwargs), x, *args)
