"""The demo's base before its pretraining: its shape, its NF4 rounding and its losses."""

import json
from pathlib import Path
from random import Random
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from vlmtune.data.encoded_example import IMAGE
from vlmtune.data.tokenize import RowEncoder
from vlmtune.demo.pretrain import preprocess
from vlmtune.demo.pretraining_data import (
    GRID,
    IGNORED,
    cached_encode,
    encode_conversation,
)
from vlmtune.demo.pretraining_model import (
    NF4_BLOCK,
    RoundedToNF4,
    answer_logits,
    image_tokens,
    new_base,
    quantized_layers,
)
from vlmtune.demo.toy_questions import ask
from vlmtune.demo.toys import draw_toys
from vlmtune.demo.trained import BASE


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_base()


def test_the_shipped_tokenizer_and_sizes_are_what_the_script_makes(
    made: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = made
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_bytes()) == json.loads(
        (BASE / "tokenizer.json").read_bytes()
    )
    shipped = json.loads((BASE / "config.json").read_bytes())
    assert model.config.text_config.hidden_size == shipped["text_config"]["hidden_size"]
    assert model.config.vision_config.patch_size == shipped["vision_config"]["patch_size"]
    assert all(layer.weight.numel() % NF4_BLOCK == 0 for layer in quantized_layers(model))


def test_rows_pixels_and_logits_are_those_of_training(made: tuple[Any, Any]) -> None:
    model, processor = made
    tokenizer, rng = processor.tokenizer, Random(5)
    image, things = draw_toys(rng)
    turns = [ask(things, rng) for _ in range(3)]
    messages = [
        {
            "role": role,
            "content": [
                *([{"type": "image"}] if at == 0 and role == "user" else []),
                {"type": "text", "text": text},
            ],
        }
        for at, turn in enumerate(turns)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    example = RowEncoder(processor).encode(messages, [image])
    ids, labels = encode_conversation(turns, cached_encode(tokenizer), tokenizer.eos_token_id)
    opening = [tokenizer.bos_token_id, *tokenizer.encode("USER: ", add_special_tokens=False)]
    assert example.input_ids.tolist() == [*opening, *[processor.image_token_id] * GRID**2, *ids]
    assert example.labels[-len(ids) :].tolist() == labels
    assert (example.kinds == IMAGE).sum() == GRID**2
    pixels = torch.tensor(example.tensors["pixel_values"])
    values = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
    assert (preprocess(values) - pixels).abs().max() < 0.03  # the processor rounds to whole steps of 255
    with torch.no_grad():
        whole = model(
            input_ids=torch.tensor(example.input_ids[None].astype(np.int64)), pixel_values=pixels
        ).logits[0, :-1]
        images = image_tokens(model, pixels)
        logits, wanted = answer_logits(
            model, images, torch.tensor(opening), torch.tensor([ids]), torch.tensor([labels])
        )
    assert wanted.tolist() == [label for label in labels if label != IGNORED]
    torch.testing.assert_close(logits, whole[example.labels[1:] != IGNORED], atol=1e-5, rtol=1e-4)


def test_weights_are_rounded_as_bitsandbytes_does_and_gradients_pass() -> None:
    weight = torch.randn(128, 192, requires_grad=True)
    rounding = RoundedToNF4()
    assert rounding(weight) is weight
    rounding.on = True
    packed, state = bnb.quantize_4bit(weight.detach(), quant_type="nf4")
    torch.testing.assert_close(
        rounding(weight).detach(), bnb.dequantize_4bit(packed, state), atol=1e-5, rtol=1e-5
    )
    rounding(weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))
