"""Rows that were processed one by one make the batch that the processor makes of them together."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import CLIPImageProcessorPil, EfficientNetImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.data.collate import collate, split_batch
from vlmtune.data.encoded_example import IGNORED, EncodedExample, shorten
from vlmtune.data.find_input_format import find_input_format, same_examples
from vlmtune.data.input_format import InputFormat, TensorLayout
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model_ref import ModelRef

Message = dict[str, Any]
IMAGE_PART = {"type": "image"}
families = pytest.mark.parametrize(
    "family",
    [
        "llava",
        "mllama",
        "smolvlm",
        pytest.param(
            "qwen2_5_vl",
            marks=pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed"),
        ),
    ],
)


def turn(role: str, *parts: Any) -> Message:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def gradient(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(width).randint(0, 256, (height, width, 3)).astype(np.uint8))


ROWS = {
    "a": ([turn("user", IMAGE_PART, "How many?"), turn("assistant", "5")], [gradient(90, 60)]),
    "b": (
        [
            turn("user", IMAGE_PART, "and", IMAGE_PART, "Which is busier, and why?"),
            turn("assistant", "The second."),
        ],
        [gradient(40, 130), gradient(70, 71)],
    ),
    "t": ([turn("user", "What is a beam?"), turn("assistant", "A member that carries a floor.")], []),
}
SIZES = [(4, 4), (4, 60), (60, 4), (3 * 56, 57), (55, 56), (336, 336), (513, 70), (37, 700), (640, 480)]
MIXES = ["a", "b", "t", "ab", "ba", "aba", "tt", "at", "ta", "tb", "abt"]


@cache
def kit(folder: Path, floats: bool = False) -> tuple[RowEncoder, InputFormat]:
    """An encoder, and the format of its inputs: what `find_input_format` finds, or with the floats."""
    processor = ModelRef(str(folder)).processor()
    processor.tokenizer.padding_side = "right"
    input_format = find_input_format(processor)
    if floats:
        input_format = replace(input_format, normalizations={})
    return RowEncoder(processor, input_format), input_format


@families
def test_images_as_tensors_give_the_same_at_any_size(models: Path, family: str) -> None:
    encoder, found = kit(models / family)
    assert found.images_as_tensors or not is_torchvision_available()
    plain = RowEncoder(encoder.processor, replace(found, images_as_tensors=False))
    tensors = RowEncoder(encoder.processor, replace(found, images_as_tensors=True))
    messages = ROWS["a"][0]
    for size in SIZES:
        image = gradient(*size)
        one, other = plain.encode(messages, [image]), tensors.encode(messages, [image])
        assert same_examples(one, other), f"{size[0]}x{size[1]}"
        assert same_examples(one, tensors.encode(messages, [image], pixels=[np.asarray(image)]))


def batched(
    encoder: RowEncoder, input_format: InputFormat, examples: list[EncodedExample], **options: Any
) -> dict[str, torch.Tensor]:
    pad = encoder.tokenizer.pad_token_id
    batch = collate(examples, pad_token_id=pad, input_format=input_format, **options)
    return next(split_batch({name: torch.from_numpy(value) for name, value in batch.items()}, len(examples)))


def encoded(encoder: RowEncoder, mix: str) -> list[EncodedExample]:
    return [encoder.encode(*ROWS[name]) for name in mix]


def processed(encoder: RowEncoder, mix: str) -> dict[str, torch.Tensor]:
    """What the processor gives for the whole batch at once."""
    texts, images = [encoder.chat_text(ROWS[name][0]) for name in mix], [ROWS[name][1] for name in mix]
    bos = encoder.tokenizer.bos_token
    begins = bos is not None and texts[0].startswith(bos)
    flat = [image for row in images for image in row]
    nested = not type(encoder.processor).__name__.startswith(("Llava", "Qwen"))
    given = {"images": images if nested else flat} if flat else {}
    own: dict[str, torch.Tensor] = encoder.processor(
        text=texts, **given, padding=True, return_tensors="pt", add_special_tokens=not begins
    ).data
    return own


@families
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("stored", ["found", "floats"])
def test_rows_one_by_one_equal_the_whole_batch(models: Path, family: str, mix: str, stored: str) -> None:
    if family == "mllama" and "t" in mix and set(mix) != {"t"}:
        if is_torchvision_available():
            pytest.skip("with torchvision, Mllama's processor loses rows without an image of a mixed batch")
        if Version(transformers.__version__) < Version("5.23"):
            pytest.skip("before transformers 5.23, Mllama's processor refuses a batch that mixes such rows")
    encoder, pixels = kit(models / family, floats=stored == "floats")
    batch = batched(encoder, pixels, encoded(encoder, mix))
    ours, own = pixels.normalize(batch), processed(encoder, mix)
    assert ours.keys() - {"labels"} == own.keys()
    for name, expected in own.items():
        assert ours[name].shape == expected.shape, name
        if name == "pixel_values":
            torch.testing.assert_close(ours[name], expected.float(), atol=1e-5, rtol=0)
        elif (
            name == "cross_attention_mask"
        ):  # the processor also lets padding see the images; nothing reads what padding sees
            seen = own["attention_mask"].bool()
            assert torch.equal(ours[name][seen], expected[seen])
            assert not ours[name][~seen].any()
        else:
            assert torch.equal(ours[name], expected), name


@families
def test_probe_finds_that_resized_uint8_will_do(models: Path, family: str) -> None:
    encoder, pixels = kit(models / family)
    joined = TensorLayout("rows" if family in ("mllama", "smolvlm") else "items")
    assert pixels.layouts["pixel_values"] == joined
    assert pixels.normalizations["pixel_values"].channels == ("outer" if family == "qwen2_5_vl" else "plane")
    assert encoder.encode(*ROWS["b"]).tensors["pixel_values"].dtype == np.uint8
    assert InputFormat.from_dict(json.loads(json.dumps(pixels.to_dict()))) == pixels


@pytest.mark.parametrize(
    "image_processor",
    [
        EfficientNetImageProcessorPil(size={"height": 56, "width": 56}, include_top=True),  # normalises twice
        EfficientNetImageProcessorPil(
            size={"height": 56, "width": 56}, rescale_offset=True, include_top=False
        ),  # to -1 ... 1 before it normalises
    ],
    ids=["normalised twice", "offset"],
)
def test_probe_keeps_floats_where_normalising_uint8_would_differ(models: Path, image_processor: Any) -> None:
    processor = ModelRef(str(models / "llava")).processor()
    processor.image_processor = image_processor
    assert not find_input_format(processor).stores_uint8_pixels


@pytest.mark.parametrize("left_out", ["do_normalize", "do_rescale"])
def test_pixels_of_one_step_less_are_stored_as_uint8(models: Path, left_out: str) -> None:
    processor = ModelRef(str(models / "llava")).processor()
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **{left_out: False}
    )
    input_format = find_input_format(processor)
    stored = RowEncoder(processor, input_format).encode(*ROWS["a"]).tensors["pixel_values"]
    assert stored.dtype == np.uint8
    expected = RowEncoder(processor).encode(*ROWS["a"]).tensors["pixel_values"]
    found = input_format.normalize({"pixel_values": torch.from_numpy(stored)})["pixel_values"]
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


@families
def test_pixels_come_in_the_dtype_asked_for(models: Path, family: str) -> None:
    encoder, pixels = kit(models / family)
    batch = batched(encoder, pixels, encoded(encoder, "ab"))
    half = pixels.normalize(batch, torch.bfloat16)["pixel_values"]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, pixels.normalize(batch)["pixel_values"].bfloat16())
    assert batch["pixel_values"].dtype == torch.uint8, "the batch itself stays as it is"


@families
@pytest.mark.parametrize("mix", ["ab", "at"])
def test_labels_are_those_of_the_rows(models: Path, family: str, mix: str) -> None:
    encoder, pixels = kit(models / family)
    examples = encoded(encoder, mix)
    batch = batched(encoder, pixels, examples)
    for row, example in zip(batch["labels"].tolist(), examples, strict=True):
        assert row == example.labels.tolist() + [IGNORED] * (len(row) - len(example.labels))
    assert (batch["labels"] != IGNORED).any(dim=1).all()


@families
def test_a_filler_has_no_labels_and_is_otherwise_the_same(models: Path, family: str) -> None:
    encoder, pixels = kit(models / family)
    batch, filler = (
        batched(encoder, pixels, encoded(encoder, "a"), filler=filler) for filler in (False, True)
    )
    assert (filler.pop("labels") == IGNORED).all()
    assert (batch.pop("labels") != IGNORED).any()
    for name, value in batch.items():
        assert torch.equal(filler[name], value), name


@families
def test_length_is_padded_to_a_multiple(models: Path, family: str) -> None:
    encoder, pixels = kit(models / family)
    examples = encoded(encoder, "at")
    plain, padded = (batched(encoder, pixels, examples, pad_to_multiple_of=multiple) for multiple in (1, 64))
    length = plain["input_ids"].shape[1]
    assert length % 64 != 0
    for name in ("input_ids", "attention_mask", "labels", *({"cross_attention_mask"} & plain.keys())):
        assert padded[name].shape[1] == -(-length // 64) * 64
        assert torch.equal(padded[name][:, :length], plain[name])
    assert not padded["attention_mask"][:, length:].any()
    assert (padded["labels"][:, length:] == IGNORED).all()
    assert (padded["input_ids"][:, length:] == encoder.tokenizer.pad_token_id).all()


@families
def test_shortened_rows_collate(models: Path, family: str) -> None:
    encoder, pixels = kit(models / family)
    examples = encoded(encoder, "ba")
    longest = len(examples[0].input_ids) - 6
    batch = batched(encoder, pixels, [shorten(example, longest) for example in examples])
    assert batch["input_ids"].shape == (2, longest)
    whole = batched(encoder, pixels, examples)
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])
    if "cross_attention_mask" in batch:
        assert batch["cross_attention_mask"].shape[:2] == (2, longest)
