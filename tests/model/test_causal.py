"""A model whose tokens see later ones is refused before it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.errors import ModelError
from vlmtune.model.base import load_base
from vlmtune.model.causal import check_causal
from vlmtune.model_ref import ModelRef

BATCH = {"input_ids": torch.arange(20)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}


@pytest.mark.parametrize("family", ["llava", "mllama", "smolvlm"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_causal_models_are_taken(models: Path, family: str, quantization: Any) -> None:
    base = load_base(
        ModelRef(str(models / family)), quantization=quantization, dtype="float32", device=torch.device("cpu")
    )
    base.train()
    check_causal(base, BATCH)
    assert base.training, "left as it was"


def test_a_model_that_sees_later_tokens_is_refused(models: Path) -> None:
    base = load_base(
        ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    embeddings = base.get_input_embeddings()
    forward = embeddings.forward
    embeddings.forward = lambda ids: forward(ids) + forward(ids)[:, -1:]
    with pytest.raises(ModelError, match="attends to later tokens"):
        check_causal(base, BATCH)


def test_a_model_that_refuses_its_inputs_is_named_in_one_line(models: Path) -> None:
    base = load_base(
        ModelRef(str(models / "llava")), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    pixels = torch.zeros(1, 3, 56, 56)
    with pytest.raises(ModelError, match="refuses what its own processor makes of a row") as refusal:
        check_causal(base, {**BATCH, "pixel_values": pixels})
    assert "\n" not in str(refusal.value)


def test_a_class_that_casts_to_the_type_of_quantised_weights_is_refused(models: Path) -> None:
    base = load_base(
        ModelRef(str(models / "llava")), quantization="nf4", dtype="float32", device=torch.device("cpu")
    )
    layer = base.get_decoder().layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x.to(layer.mlp.up_proj.weight.dtype))
    with pytest.raises(ModelError, match="casts images to the type of weights that are quantized"):
        check_causal(base, BATCH)
