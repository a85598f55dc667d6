"""The sizes that are read from a model without weights."""

import pytest
import torch
from memory_kit import llava_7b

from vlmtune.model.shapes import model_shapes
from vlmtune.model_ref import ModelRef, model_on_meta


def test_sizes_of_llava_7b():
    found = llava_7b()
    assert (
        found.decoder_layers,
        found.hidden_size,
        found.intermediate_size,
        found.vocab_size,
        found.cross_attention_layers,
    ) == (
        32,
        4096,
        11008,
        32064,
        0,
    )
    assert found.decoder_linear_weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.adapter_features == 32 * 4 * 2 * 4096
    assert found.linear_weights + found.other_weights == pytest.approx(7.06e9, rel=2e-3)


def test_weights_are_those_of_a_loaded_model(tmp_path):
    from vlmtune.demo.models import write_model
    from vlmtune.model.base import load_base

    write_model("llava", tmp_path)
    model = load_base(
        ModelRef(str(tmp_path)), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    found = model_shapes(model_on_meta(ModelRef(str(tmp_path)).config()), [])
    assert found.linear_weights + found.other_weights == sum(
        parameter.numel() for parameter in model.parameters()
    )
