"""What makes a training step fast without changing its result: parts that apply to any model with a decoder,
each on its own.

- `lean_lora`: LoRA computed in the dtype of the activations from float32 weights, without PEFT's casts of
whole activations.
- `without_vision_gradient`: no gradient and no stored activations for a vision tower that has nothing to
train.
- `without_autocast`: the whole model in the base's own dtype, where autocast would widen every norm.
- `skip_padding_mask`: rows padded on the right need no padding mask under causal attention, which lets
attention use its fastest kernel.
- `compile_layers`: `torch.compile` for each decoder layer, which fuses norms, rotary embedding, activation,
casts and LoRA's additions.
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
from vlmtune.model.offload import Checkpoints

# training, evaluation and their batch sizes, each with a fixed and then a free length; torch's own limit is 8
RECOMPILE_LIMIT = 64


class Lean:
    """`base(x) + scaling * B A dropout(x)` in the dtype of `base(x)`.

    PEFT casts `x` to the adapter's float32 first, which writes and reads every activation at twice its size;
    here the adapter's two
    small matrices are cast instead.
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


class LeanLinear(Lean, PeftLinear): ...


class LeanLinear4bit(Lean, PeftLinear4bit): ...


class LeanLinear8bit(Lean, PeftLinear8bit): ...


LEAN: dict[type, type] = {
    PeftLinear: LeanLinear,
    PeftLinear4bit: LeanLinear4bit,
    PeftLinear8bit: LeanLinear8bit,
}


def lean_lora(model: PeftModel) -> None:
    """Let plain LoRA layers compute as `Lean` does, in place, one adapter at a time. DoRA and adapters with
    a bias stay PEFT's."""
    for module in model.modules():
        if (
            type(module) in LEAN
            and isinstance(module, LoraLayer)
            and not module.lora_variant
            and not any(module.lora_bias.values())
        ):
            module.__class__ = LEAN[type(module)]  # same attributes, other arithmetic


def without_vision_gradient(model: PreTrainedModel) -> None:
    """Run the parts beside the decoder without gradient, in place, where none of them has anything to train.

    Gradient checkpointing makes every input embedding require a gradient, the vision tower's too: it would
    be run twice and go back.
    """
    beside = parts(model)[1:]
    if not any(parameter.requires_grad for child in beside for parameter in child.parameters()):
        for child in beside:
            child.forward = torch.no_grad()(child.forward)


def without_autocast(model: PeftModel) -> bool:
    """Run the model's parts in the base's dtype without autocast, in place, where lean LoRA alone is
    trained; returns whether so."""
    if any(
        ".lora_" not in name for name, parameter in model.named_parameters() if parameter.requires_grad
    ) or any(
        isinstance(module, LoraLayer) and type(module) not in LEAN.values() for module in model.modules()
    ):
        return False
    base: Any = model.get_base_model()
    for part in parts(base):
        part.forward = torch.autocast(model.device.type, enabled=False)(part.forward)
    return True


def parts(model: PreTrainedModel) -> list[Any]:
    """The decoder, and after it the modules beside it: vision tower and projector."""
    decoder = model.get_decoder()
    for parent in model.modules():
        if decoder in parent.children():
            return [decoder, *(child for child in parent.children() if child is not decoder)]
    return [decoder]


def skip_padding_mask(model: PreTrainedModel) -> None:
    """Do not hide padding from the decoder's attention, in place; training batches are padded on the right.

    No token attends to a later one, so no token with a label sees padding. The decoder makes its attention
    masks under a copy of its config that leaves padding out, and so uses attention's fastest kernel. Calls
    with a cache (generation, which pads on the left), with position ids, or with a mask of four dimensions
    keep their padding mask.
    """
    decoder = model.get_decoder()
    whole = decoder.forward

    @wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if (
            not isinstance(mask, Tensor)
            or mask.ndim != 2
            or kwargs.get("past_key_values") is not None
            or kwargs.get("position_ids") is not None
        ):
            return whole(*args, **kwargs)
        config = decoder.config
        decoder.config = config_without_padding_mask(config)
        try:
            return whole(*args, **kwargs)
        finally:
            decoder.config = config

    decoder.forward = forward


def compile_layers(
    model: PreTrainedModel, *, compiled: bool = True, checkpoints: Checkpoints | None = None
) -> None:
    """Compile the decoder's layers with `torch.compile`, in place; the first steps take half a minute.

    Layers of one kind share their code. A checkpointed layer is compiled inside its checkpoint, which is
    `checkpoints` where given.
    """
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    torch.compiler.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
    code: dict[type, Any] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        kind = type(layer)
        if kind not in code:
            plain = getattr(kind.forward, "__wrapped__", kind.forward)  # without transformers' checkpointing
            code[kind] = torch.compile(plain) if compiled else plain
        layer.forward = partial(
            _maybe_checkpointed, layer, partial(code[kind], layer), checkpoints, index == 0
        )


def _maybe_checkpointed(
    layer: Any, run: Any, checkpoints: Checkpoints | None, first: bool, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not (layer.gradient_checkpointing and layer.training):
        return run(x, *args, **kwargs)
    if checkpoints is not None and x.is_cuda:
        return checkpoints.run(lambda x: run(x, *args, **kwargs), x, first=first)
    return run_checkpointed(layer, partial(run, **kwargs), x, *args)
