"""Each fast path against the plain one: same loss, same adapter gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from vlmtune.demo.models import write_model
from vlmtune.model.base import load_base
from vlmtune.model.fast import (
    LEAN_CLASSES,
    compile_layers,
    disable_vision_gradient,
    lean_lora,
    skip_padding_mask,
)
from vlmtune.model.lora import attach, lora_config
from vlmtune.model.lora_targets import target_modules
from vlmtune.model.step import TrainedView
from vlmtune.model_ref import ModelRef

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llava", "mllama"):
        write_model(family, folder / family)
    return folder


def adapted(folder: Path, quantization: str, *, dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
    base = load_base(ModelRef(str(folder)), quantization=quantization, dtype="float32", device=CPU, **options)
    targets = target_modules(base, None, lora_vision=False)
    model = attach(base, lora_config(base, r=4, alpha=8, dropout=dropout, target_modules=targets), seed=0)
    with torch.no_grad():  # B at zero would leave A without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    return model, base


def batch(folder: Path) -> dict[str, torch.Tensor]:
    """Two rows of different length with an image each, padded on the right."""
    import numpy as np
    from PIL import Image

    processor: Any = ModelRef(str(folder)).processor()
    processor.tokenizer.padding_side = "right"
    pixels = np.random.RandomState(0).randint(0, 255, (2, 40, 60, 3), dtype=np.uint8)
    texts = [
        f"{processor.image_token}how many?",
        f"{processor.image_token}how many people are there in this picture?",
    ]
    features = processor(
        text=texts, images=[[Image.fromarray(image)] for image in pixels], padding=True, return_tensors="pt"
    )
    labels = features["input_ids"].clone()
    labels[features["attention_mask"] == 0] = -100
    labels[:, : labels.shape[1] // 2] = -100
    labels[0, -1] = -100
    return {**features, "labels": labels}


def step(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((difference / sum(value.double().square().sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize("family", ["llava", "mllama"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_all_parts_together_change_nothing(models: Path, family: str, quantization: str):
    inputs = batch(models / family)
    plain, _ = adapted(models / family, quantization)
    loss, gradients = step(plain.train(), inputs)
    fast, base = adapted(models / family, quantization)
    lean_lora(fast)
    disable_vision_gradient(base)
    skip_padding_mask(base)
    assert any(type(module) in LEAN_CLASSES.values() for module in fast.modules())
    for checkpointing in (False, True):
        if checkpointing:
            fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            fast.enable_input_require_grads()
        found_loss, found = step(fast.train(), inputs)
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
        assert relative(found, gradients) < 1e-5


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_values_held_once_are_the_quantised_ones(models: Path, quantization: str):
    inputs = batch(models / "llava")
    quantised, _ = adapted(models / "llava", quantization)
    held, base = adapted(models / "llava", quantization, dequantized=True)
    assert {type(module).__name__ for module in base.modules()}.isdisjoint(
        {"Linear4bit", "Linear8bitLt", "Int8Linear"}
    )
    loss, gradients = step(quantised.train(), inputs)
    found_loss, found = step(held.train(), inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert relative(found, gradients) < 1e-5


def test_fp8_stays_near_the_unquantised_model(models: Path):
    inputs = batch(models / "llava")
    plain, _ = adapted(models / "llava", "none")
    loss, gradients = step(plain.train(), inputs)
    fp8, base = adapted(models / "llava", "fp8")
    assert any(type(module).__name__ == "Fp8Linear" for module in base.get_decoder().modules())
    found_loss, found = step(fp8.train(), inputs)
    torch.testing.assert_close(found_loss, loss, rtol=0.02, atol=0)
    assert (
        relative(found, gradients) < 0.25
    )  # three bits of mantissa: 4 % a product, through four layers and back


def test_dropout_is_applied_in_training_only(models: Path):
    inputs = batch(models / "llava")
    model, _ = adapted(models / "llava", "none", dropout=0.5)
    lean_lora(model)
    torch.manual_seed(0)
    first = model.train()(**inputs).loss
    assert model(**inputs).loss != first
    assert model.eval()(**inputs).loss == model(**inputs).loss


def test_mode_and_gradients_are_as_after_a_walk(models: Path):
    """Every module has the mode that the model was given last, and what is trained has no gradient after
    `zero_grad`."""
    model, _ = adapted(models / "llava", "none", dropout=0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    view = TrainedView(model)
    assert list(view.parameters()) == trained
    for mode in (True, False, False, True, True):
        assert view.train(mode) is view
        assert view.training == mode
        assert {module.training for module in model.modules()} == {mode}
    model.eval()
    assert not any(module.training for module in view.train(False).models[0].modules())
    inputs = batch(models / "llava")
    view(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    view.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    view.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dora_stays_with_peft(models: Path):
    base = load_base(ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=CPU)
    config = lora_config(
        base,
        r=4,
        alpha=8,
        dropout=0.0,
        target_modules=target_modules(base, None, lora_vision=False),
        use_dora=True,
    )
    model = attach(base, config, seed=0)
    lean_lora(model)
    assert not any(type(module) in LEAN_CLASSES.values() for module in model.modules())


def test_an_adapted_vision_tower_keeps_its_gradient(models: Path):
    base = load_base(ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=CPU)
    config = lora_config(
        base, r=4, alpha=8, dropout=0.0, target_modules=target_modules(base, None, lora_vision=True)
    )
    model = attach(base, config, seed=0)
    disable_vision_gradient(base)
    _, gradients = step(model.train(), batch(models / "llava"))
    assert any("vision_tower" in name for name in gradients)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_compiled_layers_give_the_same_step(models: Path, family: str):
    inputs = batch(models / family)
    plain, _ = adapted(models / family, "none")
    loss, gradients = step(plain.train(), inputs)
    fast, base = adapted(models / family, "none")
    lean_lora(fast)
    compile_layers(base)
    found_loss, found = step(fast.train(), inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert relative(found, gradients) < 1e-4
    assert AutoConfig.from_pretrained(str(models / family)).model_type == family
