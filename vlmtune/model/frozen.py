"""How a frozen, quantised linear layer computes.

`nf4` stays bitsandbytes' `Linear4bit`: the weight is dequantised to the compute dtype for a plain matmul. `int8` is weight-only:
`Int8Linear` dequantises the 8-bit rows and multiplies in the activations' dtype, so that a row's result does not depend on its
neighbours in the batch, activations may have any number of dimensions, and there is no rounding of activations to 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INT8_MAX = 127.0


class Int8Linear(Linear8bitLt):
    """A `Linear8bitLt` that computes weight-only: 8-bit rows times their scale, in the dtype of the activations (or of autocast).

    Being a `Linear8bitLt`, it is saved, described and given LoRA by transformers and PEFT as any 8-bit layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] in a floating dtype, of any rank and strides, to [..., out_features]."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weight, scale = int8_rows(self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _WeightOnlyInt8.apply(x, weight, scale, bias)  # type: ignore[no-any-return, no-untyped-call]


class _WeightOnlyInt8(torch.autograd.Function):
    """`x @ W.T + bias` with W dequantised in forward and again in backward: only 8-bit tensors live between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, dequantize_rows(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        weight, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ dequantize_rows(weight, scale, grad_output.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.flatten(0, -2).sum(0)
        return grad_x, None, None, grad_bias


def int8_rows(module: Linear8bitLt) -> tuple[Tensor, Tensor]:
    """The stored rows, int8 [out_features, in_features], and the largest magnitude of each, float32 [out_features].

    bitsandbytes keeps the scale on the parameter until its own first forward pass and then on the module's state; PEFT's merge puts it
    back on the parameter. Neither place follows the parameter when the whole model changes its device.
    """
    weight: Any = module.weight
    scale: Any = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data, scale.to(weight.device)


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` int8 [O, D] times `scale` float32 [O] / 127, rounded once to `dtype`; a temporary of O x D elements."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight, (scale / INT8_MAX).unsqueeze(1), out=out)  # `out` spares a float32 copy of the weight


def dequantize_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out_features, in_features] that a linear layer multiplies with, in `dtype`.

    `dtype` None is the layer's own: that in which a 4-bit weight was given, float32 for 8-bit rows, the stored one of a plain layer.

    Raises:
        TypeError: the module is no linear layer.
    """
    if isinstance(module, Linear4bit):
        packed: Any = module.weight
        weight = dequantize_4bit(packed.data, packed.quant_state)
        return weight.to(dtype or weight.dtype)
    if isinstance(module, Linear8bitLt):
        return dequantize_rows(*int8_rows(module), dtype or torch.float32)
    if isinstance(module, nn.Linear):
        return module.weight.detach().to(dtype or module.weight.dtype)
    raise TypeError(f"{type(module).__name__} is no linear layer")


def prepare_frozen(model: nn.Module, *, llm_int8: bool = False) -> None:
    """Make the quantised layers of a loaded model compute as this file says, in place; `llm_int8` leaves 8-bit layers to bitsandbytes."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weight at the first evaluation, with scales rounded to bfloat16, into a
            # layout that knows no backward pass: training after an evaluation would lose its gradients.
            module.support_avx512bf16_for_cpu = False
        elif type(module) is Linear8bitLt and not llm_int8:
            module.__class__ = Int8Linear  # same attributes, other arithmetic; hooks and parameters stay as they are
