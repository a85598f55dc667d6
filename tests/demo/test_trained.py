"""The base that ships with the demo: whole, small, able to count toys, and new to people."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from vlmtune.demo.mall import write_mall
from vlmtune.demo.toys import draw_toys
from vlmtune.demo.trained import BASE, write_trained_llava
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "llava"
    write_trained_llava(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return load_base(ModelRef(str(folder)), quantization="nf4", dtype=None, device=torch.device("cpu"))


def answers(base: Any, folder: Path, images: list[Image.Image], question: str) -> list[str]:
    processor: Any = ModelRef(str(folder)).processor()
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(text=[text] * len(images), images=[[image] for image in images], return_tensors="pt")
    ids = base.generate(**inputs, max_new_tokens=6, do_sample=False)
    return [
        text.strip()
        for text in processor.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    ]


def test_the_folder_is_a_whole_copy_of_at_most_8_mb(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    } <= set(files)
    assert files == {path.name: path.read_bytes() for path in BASE.iterdir()}
    assert sum(map(len, files.values())) <= 8e6


def test_it_counts_toys_in_nf4_and_says_the_same_every_time(base: Any, folder: Path) -> None:
    drawn = [draw_toys(Random(f"never trained on {number}")) for number in range(24)]
    images, wanted = [image for image, _ in drawn], [len(things) for _, things in drawn]
    english = answers(base, folder, images, "How many things are in this picture?")
    assert sum(answer == str(number) for answer, number in zip(english, wanted, strict=True)) >= 19
    korean = answers(base, folder, images, "물건은 몇 개입니까?")
    assert sum(answer == f"{number}개" for answer, number in zip(korean, wanted, strict=True)) >= 19
    assert answers(base, folder, images[:1], "How many things are in this picture?") == english[:1]


def test_it_has_never_seen_people(base: Any, folder: Path, tmp_path: Path) -> None:
    write_mall(tmp_path, frames=16)
    counts = [int(line.split(",")[1]) for line in (tmp_path / "labels.csv").read_text().splitlines()[1:]]
    frames = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "frames").iterdir())]
    answered = answers(base, folder, frames, "How many people are in this picture of the mall?")
    assert sum(answer == str(count) for answer, count in zip(answered, counts, strict=True)) <= 5
