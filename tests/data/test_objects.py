"""ms-swift's `objects` and their marks in the texts of a row."""

from typing import Any

import pytest

from vlmtune.data.columns import readable_columns
from vlmtune.data.image_paths import RowError
from vlmtune.data.objects import read_objects
from vlmtune.data.row_values import RowNotes

DOGS = {"ref": ["a dog", "a cat"], "bbox": [[1, 2, 30, 40], [5.5, 6, 7, 8]]}
BOTH = ["Find <ref-object> and <ref>", "<bbox><bbox>"]


def read(value: Any, texts: list[str], images: int = 1, **options: Any) -> Any:
    return read_objects(value, texts, images, RowNotes(), **options)


def test_boxes_points_and_their_images() -> None:
    found = read(DOGS, BOTH)
    assert found["refs"] == ["a dog", "a cat"]
    assert found["boxes"] == [[1, 2, 30, 40], [5.5, 6, 7, 8]]
    assert (found["images"], found["unit"], found["sizes"]) == ([0, 0], "real", [])
    two = read({**DOGS, "image_id": [1, 0], "width": [64, 50], "height": [48, 60]}, BOTH, images=2)
    assert (two["images"], two["sizes"]) == ([1, 0], [[64, 48], [50, 60]])
    assert read({"bbox": [[3, 4]]}, ["click <bbox>"])["boxes"] == [[3, 4]]
    assert read({"bbox": [3, 4, 5, 6], "bbox_type": "norm1000"}, ["<bbox>"])["unit"] == "norm1000"


@pytest.mark.parametrize(
    "value",
    [
        '{"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}',
        [{"ref": "a dog", "bbox": [1, 2, 3, 4]}],
        '[{"caption": "a dog", "bbox": [1, 2, 3, 4], "bbox_type": "real", "image": 0}]',
        {"ref": "a dog", "bbox": [1, 2, 3, 4]},
    ],
)
def test_other_spellings(value: Any) -> None:
    found = read(value, ["<ref-object>: <bbox>"])
    assert (found["refs"], found["boxes"], found["images"]) == (["a dog"], [[1, 2, 3, 4]], [0])


def test_a_row_without_boxes_has_no_objects() -> None:
    for value in (None, {}, {"ref": [], "bbox": []}, []):
        assert read(value, ["What is <ref>a dog</ref> <bbox>1, 2</bbox>? <ref>"]) is None


@pytest.mark.parametrize(
    ("value", "texts", "images", "reason"),
    [
        (DOGS, ["<bbox>"], 1, "1 <bbox> mark but 2 boxes in 'objects': write one <bbox>"),
        (DOGS, ["How many?", "2"], 1, "0 <bbox> marks but 2 boxes"),
        (DOGS, ["<ref-object>", "<bbox><bbox>"], 1, "1 <ref-object> mark but 2 refs"),
        (None, ["<bbox>"], 1, "the text holds <bbox>, but the row has no 'objects' with bbox"),
        ({"ref": [], "bbox": []}, ["<ref-object>"], 1, "but the row has no 'objects' with ref"),
        ({"bbox": [[30, 2, 1, 40]]}, ["<bbox>"], 1, "objects.bbox[0] [30, 2, 1, 40] is reversed or empty"),
        ({"bbox": [[1, 2, 1, 4]]}, ["<bbox>"], 1, "is reversed or empty"),
        ({"bbox": [[1, 2, 3]]}, ["<bbox>"], 1, "objects.bbox[0] must be [x1, y1, x2, y2], or a point [x, y]"),
        ({"bbox": [[1, 2, 3, float("nan")]]}, ["<bbox>"], 1, "objects.bbox[0] must be"),
        ({"bbox": [["1", 2, 3, 4]]}, ["<bbox>"], 1, "objects.bbox[0] must be"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "cm"}, ["<bbox>"], 1, "objects.bbox_type is 'cm'"),
        ({"bbox": [[1, 2, 3, 4]]}, ["<bbox>"], 0, "holds boxes, but the row has no image"),
        ({"bbox": [[1, 2, 3, 4]]}, ["<bbox>"], 2, "objects.image_id does not say which image"),
        ({"bbox": [[1, 2, 3, 4]], "image_id": [2]}, ["<bbox>"], 2, "objects.image_id is [2]"),
        ({"bbox": [[1, 2, 3, 4]], "width": [3], "height": [3, 4]}, ["<bbox>"], 1, "for each image"),
        ("[1, 2", ["<bbox>"], 1, "'objects' is a text that is no JSON"),
        (["a dog"], ["<bbox>"], 1, "or a list of such objects"),
        (3, ["<bbox>"], 1, "'objects' must be an object with 'ref' and 'bbox', not a number"),
        ({"ref": [3], "bbox": []}, ["<ref-object>"], 1, "objects.ref[0] must be a string"),
    ],
)
def test_bad_objects_say_why(value: Any, texts: list[str], images: int, reason: str) -> None:
    with pytest.raises(RowError) as error:
        read(value, texts, images)
    assert reason in str(error.value)


def test_what_is_not_used_is_named() -> None:
    notes = RowNotes()
    assert read_objects({**DOGS, "category": [1, 2]}, ["<bbox> <bbox>"], 1, notes) is not None
    assert notes.unused == ["field objects.ref", "field objects.category"]


def test_boxes_of_an_answer_that_is_not_there_may_be_left_over() -> None:
    assert read(DOGS, ["Find <ref-object>", "?"], has_answer=False)["refs"] == ["a dog", "a cat"]
    with pytest.raises(RowError, match="3 <bbox> marks but 2 boxes"):
        read(DOGS, ["<bbox><bbox><bbox>"], has_answer=False)


def test_columns_of_detection_data_are_not_read() -> None:
    import pyarrow as pa

    box = pa.list_(pa.list_(pa.float32()))
    ours = pa.struct([("ref", pa.list_(pa.string())), ("bbox", box)])
    theirs = pa.struct([("category", pa.list_(pa.int64())), ("bbox", box)])
    assert readable_columns(pa.schema([("objects", ours)]), None) == ["objects"]
    assert readable_columns(pa.schema([("objects", pa.string())]), None) == ["objects"]
    assert readable_columns(pa.schema([("objects", theirs)]), None) == []
