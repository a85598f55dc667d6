"""The computation of frozen linear layers, quantized or dequantized.

- nf4 uses bitsandbytes' `Linear4bit`: it dequantizes the weight to the compute dtype for a plain product.
- int8 is weight-only (`Int8Linear`): the 8-bit weight is dequantized row by row, and the product is in the
  activations' dtype. So activations are not rounded to 8 bits, they may have any number of dimensions, and a
  row's result does not depend on the other rows of its batch.
- `dequantize_layers` unpacks the weights of nf4 or int8 once and holds them in the compute dtype: the same
  values, two bytes for each weight, and no dequantizing at each use.
- fp8 multiplies 8-bit floats, both weights and activations, in the forward and backward pass (`Fp8Linear`).
  Its results differ from the other ones; it is twice as fast on Hopper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmtune.compat.torch import scaled_matmul

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Int8Linear(Linear8bitLt):
    """A weight-only `Linear8bitLt`: it multiplies dequantized rows in the activations' (or autocast's) dtype.

    It is a subclass of `Linear8bitLt`, so that transformers saves it and PEFT adapts it like any 8-bit layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] in a floating dtype, of any rank and strides, to [..., out_features]."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weight, scale = int8_rows(self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _WeightOnlyInt8.apply(x, weight, scale, bias)  # type: ignore[no-any-return]


class _WeightOnlyInt8(torch.autograd.Function):
    """`x @ W.T + bias`. W is dequantized in the forward pass and again in the backward pass."""

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
    """The stored rows of the weight, and the largest magnitude of each row.

    bitsandbytes keeps the magnitudes in an attribute of the parameter until its own first forward pass, then
    in the module's state. PEFT's merge moves them back to the parameter. Neither is moved to another device
    with the parameter.

    Returns:
        int8 [out_features, in_features], and float32 [out_features].
    """
    weight: Any = module.weight
    scale: Any = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data, scale.to(weight.device)


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` int8 [O, D] times `scale` float32 [O] / 127, rounded once to `dtype`; [O, D]."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)  # avoids a float32 copy of the weight
    return torch.mul(weight, (scale / INT8_MAX).unsqueeze(1), out=out)


def dequantize_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out_features, in_features] of a linear layer, dequantized.

    Args:
        dtype: dtype of the result. None means the dtype before quantization for 4-bit weights, float32 for
            8-bit weights, and the stored dtype for a plain layer.

    Raises:
        TypeError: the module is not a linear layer.
    """
    if isinstance(module, Linear4bit):
        packed: Any = module.weight
        weight = dequantize_4bit(packed.data, packed.quant_state)
        return weight.to(dtype or weight.dtype)
    if isinstance(module, Linear8bitLt):
        return dequantize_rows(*int8_rows(module), dtype or torch.float32)
    if isinstance(module, nn.Linear):
        return module.weight.detach().to(dtype or module.weight.dtype)
    raise TypeError(f"{type(module).__name__} is not a linear layer")


def prepare_quantized_layers(model: nn.Module, *, llm_int8: bool = False) -> None:
    """Make the quantized layers of a loaded model compute as described in this module, in place.

    Args:
        llm_int8: keep bitsandbytes' own computation of 8-bit layers (LLM.int8).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weight at the first evaluation, with scales
            # rounded to bfloat16. The repacked layout has no backward pass, so training after an evaluation
            # would get no gradients.
            module.support_avx512bf16_for_cpu = False
        elif type(module) is Linear8bitLt and not llm_int8:
            module.__class__ = Int8Linear  # keeps attributes, hooks and parameters


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer by a plain `nn.Linear` with the same values in `dtype`, in place."""
    for parent, name in _children(model, lambda child: isinstance(child, Linear4bit | Linear8bitLt)):
        setattr(parent, name, _plain_linear(getattr(parent, name), dtype))


def _children(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str]]:
    """(parent, name) of each wanted module. A list of the modules would keep replaced ones in memory."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if wanted(child)
    ]


def _plain_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(dequantize_weight(layer, dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return plain.train(layer.training)


class Fp8Linear(nn.Linear):
    """A frozen linear layer that multiplies 8-bit floats (e4m3).

    Each row of the weight has a scale, and so have each token's activations and gradient. The backward pass
    uses the same weight values as the forward pass: the rows' scales are multiplied into the gradient before
    it is
        rounded. A
    device without units for 8-bit floats multiplies the rounded values in the activations' dtype.

    Attributes:
        weight: the bits of the weight as uint8 [out_features, in_features], because uint8 is not trainable.
        transposed: the same bits as [in_features, out_features], because the matrix units read both operands
            along the summed dimension.
        scale: the rows' scales, float32 [out_features].
    """

    transposed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        bits, scale = quantize_rows(layer.weight.detach())
        self.weight = nn.Parameter(bits.view(torch.uint8), requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale.flatten(), persistent=False)
        self.register_buffer("transposed", bits.view(torch.uint8).t().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features] to [..., out_features], in the dtype of `x` (or autocast)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _Fp8Matmul.apply(x, self.weight, self.transposed, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(transposed, scale)
        return _scaled_matmul(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        transposed, scale = ctx.saved_tensors
        ones = torch.ones(len(transposed), dtype=torch.float32, device=scale.device)
        return _scaled_matmul(grad_output * scale.to(grad_output.dtype), transposed, ones), None, None, None


def _scaled_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply `x` [..., D], rounded to fp8 row by row, with `weight` [O, D] (bits) and `scale` [O].

    Returns:
        [..., O] in the dtype of `x`.
    """
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    if has_fp8_units(x.device):
        y = scaled_matmul(rows, weight.view(FP8).t(), row_scale, scale.unsqueeze(0))
    else:
        y = (rows.to(x.dtype) * row_scale.to(x.dtype)) @ (
            weight.view(FP8).to(x.dtype) * scale.to(x.dtype).unsqueeze(1)
        ).t()
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` [N, D] to e4m3, after scaling each row so that its largest magnitude is 448.

    Returns:
        The rounded values, float8_e4m3fn [N, D], and the scales to multiply them with, float32 [N, 1].
    """
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-30)
    return (wide / scale).to(FP8), scale


def has_fp8_units(device: torch.device) -> bool:
    """Whether `device` multiplies 8-bit floats with a scale for each row (NVIDIA Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def make_fp8(language_model: nn.Module) -> None:
    """Replace the plain linear layers of the language model by `Fp8Linear`, in place.

    Layers whose sizes are not multiples of 16 are not replaced, because the matrix units need such sizes.
    """
    for parent, name in _children(language_model, _fits_fp8):
        setattr(parent, name, Fp8Linear(getattr(parent, name)))


def _fits_fp8(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.in_features % 16 == 0 and module.out_features % 16 == 0
