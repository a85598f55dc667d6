"""The sizes that are read from a model's outline."""

import pytest
import torch
from memory_kit import llava_7b

from vlmtune.model.shapes import model_shapes
from vlmtune.model_ref import ModelRef, outline


def test_sizes_of_llava_7b():
    found = llava_7b()
    assert (
        found.layers,
        found.hidden_size,
        found.intermediate_size,
        found.vocab_size,
        found.cross_layers,
    ) == (
        32,
        4096,
        11008,
        32064,
        0,
    )
    assert found.decoder == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.adapter_features == 32 * 4 * 2 * 4096
    assert found.quantized + found.other == pytest.approx(7.06e9, rel=2e-3)


def test_weights_are_those_of_a_loaded_model(tmp_path):
    from vlmtune.demo.models import write_model
    from vlmtune.model.base import load_base

    write_model("llava", tmp_path)
    model = load_base(
        ModelRef(str(tmp_path)), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    found = model_shapes(outline(ModelRef(str(tmp_path)).config()), [])
    assert found.quantized + found.other == sum(parameter.numel() for parameter in model.parameters())
