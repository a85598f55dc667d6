"""A box that is drawn on an image is where the answer's numbers say, in what each family's processor made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from families.builders import build
from PIL import Image, ImageDraw
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.config.options import DataSettings
from vlmtune.config.settings import Settings
from vlmtune.data.box_formats import (
    BOX_FORMATS,
    CHOICES,
    FORMAT_OF_MODEL,
    BoxWriter,
    box_format_name,
    resized_size,
)
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.examples import encode_row
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.formats import read_fragment
from vlmtune.data.scan import scan
from vlmtune.data.template_rendering import EncodeError
from vlmtune.data.tokenize import RowEncoder
from vlmtune.evaluation.generate import reference
from vlmtune.evaluation.grounding import boxes_and_points
from vlmtune.model_ref import ModelRef

pytestmark = [
    pytest.mark.skipif(not is_torchvision_available(), reason="these families' processors need torchvision"),
    pytest.mark.filterwarnings("ignore"),  # of transformers', about sizes of tiny models
]
SIZE = (150, 100)
BOX = (30.0, 20.0, 100.0, 70.0)


def write_row(folder: Path, box: tuple[float, ...] = BOX, **objects: Any) -> Path:
    """An image with a red rectangle, and a row that says where it is."""
    image = Image.new("RGB", SIZE)
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=(255, 0, 0))
    image.save(folder / "a.png")
    row = {
        "messages": [
            {"role": "user", "content": "<image>Where is <ref-object>?"},
            {"role": "assistant", "content": "It is at <bbox>."},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["the red box"], "bbox": [list(box)], **objects},
    }
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def encoded(family: str, folder: Path, choice: str = "auto", **objects: Any) -> tuple[Any, Any, Any]:
    """(encoder, index line, example) of the row, through the family's model folder."""
    build(family, folder / family)
    model = ModelRef(str(folder / family))
    processor = model.processor()
    encoder = RowEncoder(processor, find_input_format(processor), box_format_name(model, choice))
    (fragment,) = scan(str(write_row(folder, **objects)))
    (row,) = read_fragment(fragment)
    return encoder, *encode_row(encoder, row)


def of_patches(example: EncodedExample, processor: Any) -> np.ndarray:
    """Red of the resized image `[H, W]` from Qwen's flattened patches."""
    images = processor.image_processor
    side, merge, frames = images.patch_size, images.merge_size, images.temporal_patch_size
    _, rows, columns = (int(number) for number in example.tensors["image_grid_thw"][0])
    patches = example.tensors["pixel_values"].reshape(
        rows // merge, columns // merge, merge, merge, 3, frames, side, side
    )
    red = patches[:, :, :, :, 0, 0]
    return red.transpose(0, 2, 4, 1, 3, 5).reshape(rows * side, columns * side)


def of_thumbnail(example: EncodedExample, processor: Any) -> np.ndarray:
    """Red of the last crop, which shows the whole image."""
    red: np.ndarray = example.tensors["pixel_values"][-1][0]
    return red


Pixels = Callable[[EncodedExample, Any], np.ndarray]
FAMILIES_WITH_BOXES: dict[str, tuple[Pixels, str]] = {
    "qwen2_vl": (
        of_patches,
        "It is at <|box_start|>(200,200),(667,700)<|box_end|>.",
    ),
    "qwen2_5_vl": (of_patches, "It is at [22, 17, 75, 59]."),  # of 112 x 84 pixels
    "qwen3_vl": (of_patches, "It is at [200, 200, 667, 700]."),
    "qwen3_5": (of_patches, "It is at [200, 200, 667, 700]."),
    "glm4v": (of_patches, "It is at [200, 200, 667, 700]."),
    "internvl": (of_thumbnail, "It is at <box>[[200, 200, 667, 700]]</box>."),
}


@pytest.mark.parametrize("family", FAMILIES_WITH_BOXES)
def test_the_numbers_are_where_the_processor_draws_the_box(family: str, tmp_path: Path) -> None:
    pixels, text = FAMILIES_WITH_BOXES[family]
    encoder, line, example = encoded(family, tmp_path)
    assert line["error"] is None
    answer = encoder.tokenizer.decode(example.input_ids[example.labels >= 0])
    assert answer.startswith(text)
    assert "the red box" in encoder.tokenizer.decode(example.input_ids)
    red = pixels(example, encoder.processor)
    rows, columns = np.nonzero(red > (red.max() + red.min()) / 2)
    drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    (box,) = boxes_and_points(reference(encoder.tokenizer, example))[0]
    form = BOX_FORMATS[FORMAT_OF_MODEL[family]]
    unit = 1.0 if form.unit == "resized" else form.scale / np.array([*red.shape[::-1]] * 2)
    assert np.abs(np.array(box) / unit - drawn).max() <= 1.01, (box, drawn)  # pixels of the resized image


def test_the_family_marks_the_name_too(tmp_path: Path) -> None:
    encoder, _, example = encoded("qwen2_vl", tmp_path)
    text = encoder.tokenizer.decode(example.input_ids)
    assert "Where is <|object_ref_start|>the red box<|object_ref_end|>?" in text


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("absolute", "[30, 20, 100, 70]"),
        ("norm1000", "[200, 200, 667, 700]"),
        ("norm1", "[0.200, 0.200, 0.667, 0.700]"),
    ],
)
def test_a_chosen_format_works_with_any_family(choice: str, text: str, tmp_path: Path) -> None:
    encoder, _, example = encoded("llava", tmp_path, choice)
    assert reference(encoder.tokenizer, example) == f"It is at {text}."


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("auto", "how a model of type 'llava' counts is not known: say it with --box_format absolute, "),
        ("absolute_resized", "processor crops, pads or tiles images"),
    ],
)
def test_what_is_not_known_is_a_bad_row(choice: str, reason: str, tmp_path: Path) -> None:
    _, line, example = encoded("llava", tmp_path, choice)
    assert example is None
    assert reason in line["error"]


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"box": (30, 20, 151, 70)}, "objects.bbox[0] [30, 20, 151, 70] lies outside its image of 150x100"),
        ({"box": (-1, 20, 30, 70)}, "lies outside its image"),
        ({"box": (0.2, 0.2, 1.2, 0.7), "bbox_type": "norm1"}, "lies outside its image of 0 to 1 (norm1)"),
        ({"width": [300], "height": [200]}, "say 300x200 pixels, and the image has 150x100"),
    ],
)
def test_a_box_outside_its_image_is_a_bad_row(objects: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _, line, _ = encoded("qwen3_vl", tmp_path, **objects)
    assert reason in line["error"]


def test_points_units_and_images() -> None:
    images = [Image.new("RGB", (100, 50)), Image.new("RGB", (200, 200))]
    text = {"type": "text", "text": "<bbox> <bbox> <bbox>"}
    messages = [{"role": "assistant", "content": [text]}]
    objects = {
        "refs": [],
        "boxes": [[50, 25], [0.1, 0.2, 0.5, 1.0], [10, 20, 100, 200]],
        "images": [0, 1, 1],
        "sizes": [],
    }
    written = BoxWriter("norm1000", None).write(messages, {**objects, "unit": "norm1000"}, images)
    assert written[0]["content"][0]["text"] == "[50, 25] [0, 0, 0, 1] [10, 20, 100, 200]"
    real = {**objects, "boxes": [[50, 25], [20, 40, 100, 200], [0, 0, 200, 200]], "unit": "real"}
    written = BoxWriter("qwen2_vl", None).write(messages, real, images)
    assert written[0]["content"][0]["text"] == (
        "<|box_start|>(500,500)<|box_end|> <|box_start|>(100,200),(500,999)<|box_end|> "
        "<|box_start|>(0,0),(999,999)<|box_end|>"
    )
    assert messages[0]["content"][0]["text"] == "<bbox> <bbox> <bbox>"  # the row itself stays as it is


def test_the_resized_size_is_that_of_the_whole_image() -> None:
    from transformers import CLIPImageProcessor

    resized = CLIPImageProcessor(size={"height": 40, "width": 60}, do_center_crop=False)
    assert resized_size(resized, (150, 100)) == (60, 40)
    with pytest.raises(EncodeError, match="crops, pads or tiles"):
        resized_size(CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=40), (150, 100))


def test_the_flag_has_the_formats_that_there_are() -> None:
    assert Settings.from_flags({"box_format": "norm1"}).data.box_format == "norm1"
    assert get_args(get_type_hints(DataSettings)["box_format"]) == CHOICES
