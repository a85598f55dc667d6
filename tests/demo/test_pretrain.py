"""The making of the demo's base, step by step and once through at a tiny size."""

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
from vlmtune.demo import lessons, pretrain
from vlmtune.demo.kinds import NAMES
from vlmtune.demo.quiz import ask
from vlmtune.demo.toys import Thing, draw_toys
from vlmtune.demo.trained import BASE
from vlmtune.model_ref import ModelRef


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pretrain.new_base()


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
    assert all(layer.weight.numel() % pretrain.NF4_BLOCK == 0 for layer in pretrain.linears(model))


def test_rows_pixels_and_logits_are_those_of_training(made: tuple[Any, Any]) -> None:
    model, processor = made
    tokenizer, rng = processor.tokenizer, Random(5)
    picture, things = draw_toys(rng)
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
    example = RowEncoder(processor).encode(messages, [picture])
    ids, labels = lessons.conversation(turns, lessons.encoder(tokenizer), tokenizer.eos_token_id)
    opening = [tokenizer.bos_token_id, *tokenizer.encode("USER: ", add_special_tokens=False)]
    assert example.input_ids.tolist() == [*opening, *[processor.image_token_id] * lessons.GRID**2, *ids]
    assert example.labels[-len(ids) :].tolist() == labels
    assert (example.kinds == IMAGE).sum() == lessons.GRID**2
    pixels = torch.tensor(example.tensors["pixel_values"])
    values = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert (
        pretrain.prepared(values) - pixels
    ).abs().max() < 0.03  # the processor rounds to whole steps of 255
    with torch.no_grad():
        whole = model(
            input_ids=torch.tensor(example.input_ids[None].astype(np.int64)), pixel_values=pixels
        ).logits[0, :-1]
        images = pretrain.image_tokens(model, pixels)
        logits, wanted = pretrain.answer_logits(
            model, images, torch.tensor(opening), torch.tensor([ids]), torch.tensor([labels])
        )
    assert wanted.tolist() == [label for label in labels if label != lessons.IGNORED]
    torch.testing.assert_close(logits, whole[example.labels[1:] != lessons.IGNORED], atol=1e-5, rtol=1e-4)


def test_weights_are_rounded_as_bitsandbytes_does_and_gradients_pass() -> None:
    weight = torch.randn(128, 192, requires_grad=True)
    rounding = pretrain.RoundedToNF4()
    assert rounding(weight) is weight
    rounding.on = True
    packed, state = bnb.quantize_4bit(weight.detach(), quant_type="nf4")
    torch.testing.assert_close(
        rounding(weight).detach(), bnb.dequantize_4bit(packed, state), atol=1e-5, rtol=1e-5
    )
    rounding(weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))


def test_lessons_do_not_depend_on_the_number_of_processes(made: tuple[Any, Any]) -> None:
    one, two = (
        lessons.make_lessons(7, made[1].tokenizer, seed=3, processes=number).arrays() for number in (1, 2)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert (one["labels"] != lessons.IGNORED).any(-1).all()
    assert one["pictures"].reshape(7, -1).std(1).min() > 0


def test_patches_tell_what_has_its_middle_in_them() -> None:
    things = [
        Thing("car", "red", (0, 0, 10, 8)),
        Thing(None, "blue", (2, 2, 10, 8)),
        Thing("cup", "green", (100, 70, 118, 90)),
    ]
    number, kind, _ = lessons.patches(things)
    assert (number[0], number[-1], number.sum()) == (2, 1, 3)
    assert (kind[0], kind[-1], kind[1]) == (len(NAMES), NAMES.index("cup"), lessons.IGNORED)


def test_the_learning_rate_rises_and_falls() -> None:
    paces = [pretrain.pace(step, 200) for step in range(200)]
    assert paces[0] < 0.2 and max(paces) > 0.98 and paces[-1] < 0.01
    assert paces[10:] == sorted(paces[10:], reverse=True)


def test_the_script_makes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "HELD_BACK", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        pretrain.main(["--output_dir", str(tmp_path), "--pictures", "16", "--steps", "2", "--batch", "4"])
        == 0
    )
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["step"] == 2 and line["answers"] < 8
    assert {path.name for path in BASE.iterdir()} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "unfinished.pt").exists()
    from vlmtune.model.base import load_base

    assert (
        load_base(ModelRef(str(tmp_path)), quantization="nf4", dtype=None, device=torch.device("cpu")).dtype
        == torch.float32
    )
