"""The adapters of many trials over one frozen layer, against PEFT's own LoRA for each of them."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from vlmtune.packed.layers import (
    AdapterLayout,
    PackedLinear,
    RowAdapters,
    TargetLayer,
    hash_dropout,
    pack_layers,
)

RANKS = (1, 3, 8, 16)
TARGETS = [
    TargetLayer("deep.q", 24, 40),
    TargetLayer("cross.k", 40, 24, image_only=True),
    TargetLayer("o", 40, 24),
]


def random_adapter(
    rank: int, seed: int, targets: list[TargetLayer] = TARGETS
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        target.name: (random(rank, target.in_features), random(target.out_features, rank))
        for target in targets
    }


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_is_unpacked_as_it_was_packed(rank: int) -> None:
    layout, adapter = AdapterLayout(TARGETS, 16), random_adapter(rank, 0)
    found = layout.unpack(layout.pack(adapter), [target.name for target in TARGETS], rank)
    assert found.keys() == adapter.keys()
    assert all(
        torch.equal(mine, given)
        for name in adapter
        for mine, given in zip(found[name], adapter[name], strict=True)
    )


def test_layers_that_only_images_reach_come_last() -> None:
    layout = AdapterLayout(TARGETS, 2)
    image_only = layout.pack(random_adapter(2, 1, [TARGETS[1]]))
    assert not image_only[: layout.image_start].any()
    assert image_only[layout.image_start :].all()
    assert layout.size - layout.image_start == 2 * (40 + 24)


def test_layers_that_an_adapter_leaves_out_are_zero() -> None:
    layout = AdapterLayout(TARGETS, 4)
    flat = layout.pack(random_adapter(4, 0, TARGETS[:1]))
    assert int(flat.count_nonzero()) == 4 * (24 + 40)


def make(rows: int, *, rank: int = 16) -> tuple[PackedLinear, RowAdapters, AdapterLayout]:
    torch.manual_seed(5)
    layout = AdapterLayout([TargetLayer("q", 24, 40)], rank)
    layer = PackedLinear(nn.Linear(24, 40, dtype=torch.float64).requires_grad_(False), 0)
    adapters = RowAdapters(layout, rows, torch.float64, torch.device("cpu"))
    layer.bind(adapters, adapters.pairs[0])
    return layer, adapters, layout


def fill(
    adapters: RowAdapters, layout: AdapterLayout, ranks: tuple[int, ...], scalings: tuple[float, ...]
) -> None:
    with torch.no_grad():
        for row, rank in enumerate(ranks):
            adapters.flat[row] = layout.pack(random_adapter(rank, row, layout.targets))
    adapters.set_scaling(scalings)


def test_every_row_goes_through_its_own_adapter_as_peft_computes_it() -> None:
    layer, adapters, layout = make(len(RANKS))
    scalings = (2.0, 0.5, 1.0, 4.0)
    fill(adapters, layout, RANKS, scalings)
    x = torch.randn(len(RANKS), 7, 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    gradients = adapters.gradients()
    for row, (rank, scaling) in enumerate(zip(RANKS, scalings, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=1)
        peft = PeftLinear(layer.base, "default", config=config, r=rank, lora_alpha=scaling * rank)
        a, b = random_adapter(rank, row, layout.targets)["q"]
        peft.lora_A["default"].weight.data, peft.lora_B["default"].weight.data = a.double(), b.double()
        alone = x.detach()[row : row + 1].requires_grad_()
        expected = peft(alone)
        expected.backward(upstream[row : row + 1])
        torch.testing.assert_close(y[row : row + 1], expected)
        torch.testing.assert_close(x.grad[row : row + 1], alone.grad)
        found_a, found_b = layout.unpack(gradients[row], ["q"], rank)["q"]
        torch.testing.assert_close(found_a, peft.lora_A["default"].weight.grad)
        torch.testing.assert_close(found_b, peft.lora_B["default"].weight.grad)
        filled = layout.pack({"q": (found_a, found_b)})
        assert torch.equal(gradients[row].float(), filled), "the padding of a lower rank has no gradient"


def test_a_neighbour_changes_nothing_not_even_with_nan() -> None:
    layer, adapters, layout = make(3)
    x, upstream = torch.randn(3, 7, 24, dtype=torch.float64), torch.randn(3, 7, 40, dtype=torch.float64)

    def run(spoil: float) -> tuple[torch.Tensor, torch.Tensor]:
        fill(adapters, layout, (4, 8, 16), (1.0, 1.0, spoil))
        with torch.no_grad():
            adapters.flat[2] *= spoil
        for tensor in adapters.trained_tensors:
            tensor.grad = None
        given = x.clone()
        given[2] *= spoil
        y = layer(given)
        y.backward(upstream)
        return y.detach()[:2], adapters.gradients()[:2]

    clean = run(1.0)
    for spoil in (float("nan"), 1e30, 0.0):
        assert all(torch.equal(one, other) for one, other in zip(run(spoil), clean, strict=True))


def test_rows_of_several_parts_go_through_one_adapter() -> None:
    """Mllama's cross-attention sees each tile of an image as a row."""
    layer, adapters, layout = make(2)
    fill(adapters, layout, (4, 4), (1.0, 2.0))
    tiles = torch.randn(6, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(tiles), layer(tiles.view(2, 15, 24)).view(6, 5, 40))


def test_without_adapters_it_is_the_frozen_layer() -> None:
    layer, _, _ = make(2)
    layer.bind(None, None)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


def test_dropout_is_right_in_distribution_and_a_function_of_key_layer_and_place_alone() -> None:
    rate = torch.tensor([0.1, 0.5, 0.0])
    threshold = (rate * 2**31).to(torch.int32).view(3, 1, 1)
    boost = (1 / (1 - rate)).view(3, 1, 1)
    key = torch.tensor([1, 2, 3], dtype=torch.int32).view(3, 1, 1)
    x, number = torch.rand(3, 1000, 256) + 0.5, torch.tensor(7, dtype=torch.int32)
    y = hash_dropout(x, key, number, threshold, boost)
    zero = y == 0
    torch.testing.assert_close(zero.float().mean((1, 2)), rate, atol=3e-3, rtol=0)
    torch.testing.assert_close(
        zero.float().mean(1)[0], torch.full((256,), 0.1), atol=0.05, rtol=0
    )  # five standard deviations
    torch.testing.assert_close(y.mean((1, 2)), x.mean((1, 2)), rtol=5e-3, atol=0)
    assert torch.equal(y[2], x[2])
    alone = hash_dropout(x[1:2], key[1:2], number, threshold[1:2], boost[1:2])
    assert torch.equal(alone[0], y[1]), "it does not depend on the row's neighbours"
    for changed in (
        hash_dropout(x, key + 1, number, threshold, boost),
        hash_dropout(x, key, number + 1, threshold, boost),
    ):
        both = (changed == 0)[0] & zero[0]
        assert abs(float(both.float().mean()) - 0.01) < 2e-3, (
            "other keys and other layers have zeros of their own"
        )


def test_compiled_dropout_is_the_same() -> None:
    x, number = torch.rand(2, 30, 64), torch.tensor(1, dtype=torch.int32)
    key = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32).view(2, 1, 1)
    threshold, boost = torch.full((2, 1, 1), 2**30, dtype=torch.int32), torch.full((2, 1, 1), 2.0)
    eager = hash_dropout(x, key, number, threshold, boost)
    assert torch.equal(
        torch.compile(hash_dropout, backend="aot_eager")(x, key, number, threshold, boost), eager
    )


def test_layers_are_wrapped_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    first = pack_layers(model, ["1.0"])
    again = pack_layers(model, ["1.0", "0"])
    assert again["1.0"] is first["1.0"] is model[1][0]
    assert isinstance(model[0], PackedLinear)
    other = pack_layers(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), ["0", "1.0"])
    assert other["1.0"].layer_id == first["1.0"].layer_id != other["0"].layer_id, (
        "dropout does not depend on which other layers have adapters"
    )
