"""The arithmetic of frozen quantised layers, against the same weight dequantised to a plain tensor."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from vlmtune.model.frozen import Int8Linear, dequantize_weight, int8_rows, prepare_quantized_layers

WIDTH, OUT = 64, 96


def int8_layer(*, weight_only: bool = True, threshold: float = 6.0, bias: bool = True) -> Linear8bitLt:
    torch.manual_seed(0)
    layer = Linear8bitLt(WIDTH, OUT, bias=bias, has_fp16_weights=False, threshold=threshold)
    layer = layer.to("cpu")  # quantises
    layer.requires_grad_(False)
    model = nn.Sequential(layer)
    prepare_quantized_layers(model, llm_int8=not weight_only)
    return model[0]


def nf4_layer(dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(0)
    layer = Linear4bit(WIDTH, OUT, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    layer.weight.data = layer.weight.data.to(dtype)
    layer = layer.to("cpu")
    layer.requires_grad_(False)
    model = nn.Sequential(layer)
    prepare_quantized_layers(model)
    return model[0]


def test_int8_is_rows_times_their_scale_over_127():
    layer = int8_layer()
    rows, scale = int8_rows(layer)
    assert isinstance(layer, Int8Linear)
    assert rows.dtype == torch.int8
    assert rows.shape == (OUT, WIDTH)
    assert torch.equal(rows.abs().amax(dim=1), torch.full((OUT,), 127, dtype=torch.int8))
    expected = rows.double() * scale.double().unsqueeze(1) / 127
    torch.testing.assert_close(dequantize_weight(layer).double(), expected, rtol=2e-7, atol=0)
    assert torch.equal(dequantize_weight(layer, torch.bfloat16), dequantize_weight(layer).bfloat16())


@pytest.mark.parametrize(
    "shape", [(WIDTH,), (5, WIDTH), (2, 5, WIDTH), (2, 3, 5, WIDTH), (2, 2, 3, 5, WIDTH)]
)
@pytest.mark.parametrize("training", [True, False])
def test_int8_forward_and_input_gradient(shape: tuple[int, ...], training: bool):
    layer = int8_layer().train(training)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)

    reference = x.detach().double().requires_grad_()
    expected = nn.functional.linear(reference, dequantize_weight(layer, torch.float64), layer.bias.double())
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=2e-6)


def test_int8_takes_any_strides():
    layer = int8_layer()
    x = torch.randn(3, WIDTH, 4).transpose(1, 2)
    sliced = torch.randn(2, 6, 2 * WIDTH)[:, ::2, ::2]
    for view in (x, sliced):
        assert not view.is_contiguous()
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=0, atol=1e-6)


def test_int8_gradient_through_a_strided_upstream():
    layer = int8_layer()
    x = torch.randn(3, 4, WIDTH, requires_grad=True)
    upstream = torch.randn(OUT, 4, 3).permute(2, 1, 0)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dequantize_weight(layer), rtol=0, atol=1e-5)


def test_int8_has_the_gradient_that_finite_differences_find():
    layer = int8_layer()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_int8_bias_may_require_a_gradient():
    layer = int8_layer()
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 3, WIDTH)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 6.0))


def test_int8_computes_in_the_dtype_of_the_activations():
    layer = int8_layer()
    x = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, nn.functional.linear(x, dequantize_weight(layer, torch.bfloat16), layer.bias.bfloat16())
    )
    assert layer.bias.dtype == torch.float32  # bitsandbytes' own forward would have cast it in place


def test_int8_computes_in_autocasts_dtype():
    layer = int8_layer()
    x = torch.randn(4, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_int8_rows_do_not_influence_each_other():
    layer = int8_layer()
    row, ordinary = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    outlier = ordinary.clone()
    outlier[:, 7] = 100.0
    assert torch.equal(layer(torch.stack([row, outlier]))[0], layer(torch.stack([row, ordinary]))[0])
    torch.testing.assert_close(layer(torch.stack([row, outlier]))[0], layer(row), rtol=0, atol=1e-6)


def test_llm_int8_lets_a_rows_result_depend_on_its_neighbours():
    """Why `int8` is weight-only: bitsandbytes chooses outlier columns over the whole batch."""
    layer = int8_layer(weight_only=False).eval()
    assert type(layer) is Linear8bitLt
    row, ordinary = torch.randn(1, 5, WIDTH), torch.randn(1, 5, WIDTH)
    outlier = ordinary.clone()
    outlier[..., 7] = 100.0
    with torch.no_grad():
        shift = layer(torch.cat([row, outlier]))[0] - layer(torch.cat([row, ordinary]))[0]
    assert shift.abs().max() > 1e-4


def test_only_8_bit_tensors_wait_for_the_backward_pass():
    layer = int8_layer()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, WIDTH, requires_grad=True))
    assert [tensor.dtype for tensor in saved if tensor.numel() >= OUT * WIDTH] == [torch.int8]
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == OUT * WIDTH + OUT * 4


def test_int8_survives_bitsandbytes_own_bookkeeping():
    """The scale moves from the parameter to the module's state, and copies keep it."""
    layer = int8_layer()
    x = torch.randn(3, WIDTH)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    layer.init_8bit_state()
    assert layer.weight.SCB is None
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.to("cpu")(x), before)


def test_int8_state_dict_holds_rows_and_scales():
    layer = int8_layer()
    layer(torch.randn(1, WIDTH))
    state = layer.state_dict()
    other = int8_layer()
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    assert state["weight"].dtype == torch.int8
    assert torch.equal(state["SCB"], int8_rows(layer)[1])
    assert torch.equal(dequantize_weight(other), dequantize_weight(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_matmul_with_its_dequantised_weight(dtype: torch.dtype):
    layer = nf4_layer(dtype)
    weight = dequantize_weight(layer)
    assert layer.weight.quant_state.nested
    assert weight.dtype == dtype
    assert weight.shape == (OUT, WIDTH)
    assert len(weight[0].unique()) <= 16  # a block of 64 values has 16 levels
    x = torch.randn(2, 3, 5, WIDTH, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        y, nn.functional.linear(x, weight, layer.bias.to(dtype)), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ weight, rtol=0, atol=4 * tolerance)


def test_nf4_trains_after_an_evaluation():
    """bitsandbytes on a CPU with AVX512-BF16 would repack the weight in the evaluation, with other values
    and no backward pass."""
    layer = nf4_layer()
    packed, weight = layer.weight.data.clone(), dequantize_weight(layer)
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    x.requires_grad_()
    trained = layer.train()(x)
    trained.sum().backward()
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(dequantize_weight(layer), weight)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad, torch.ones(4, OUT) @ weight, rtol=0, atol=1e-5)


def test_dequantised_values_of_nf4_in_another_dtype():
    layer = nf4_layer(torch.bfloat16)
    exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize_weight(layer, torch.float32), exact.float())


def test_dequantising_other_layers():
    plain = nn.Linear(4, 3)
    assert torch.equal(dequantize_weight(plain), plain.weight)
    assert not dequantize_weight(plain).requires_grad
    assert torch.equal(dequantize_weight(plain, torch.bfloat16), plain.weight.bfloat16())
    with pytest.raises(TypeError, match="Conv2d is not a linear layer"):
        dequantize_weight(nn.Conv2d(1, 1, 1))
