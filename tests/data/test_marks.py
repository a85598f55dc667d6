"""Marks for images in a text."""

from typing import Any

import pytest
from formats_kit import IMAGE, png, read, read_whole, text, turn, write_lines

from vlmtune.data.marks import split_marks


def test_white_space_between_words_and_marks_is_kept() -> None:
    assert split_marks("Look at <image> and count") == [text("Look at "), IMAGE, text(" and count")]
    assert split_marks("A:\n<image>\nB:\n<image>\nWhich?") == [
        text("A:\n"),
        IMAGE,
        text("\nB:\n"),
        IMAGE,
        text("\nWhich?"),
    ]
    assert split_marks("<image>\n<image>\nHow many?\n<image>") == [IMAGE, IMAGE, text("How many?"), IMAGE]
    assert split_marks(" plain ") == [text(" plain ")]


def rows(folder: Any, question: str, images: list[str], **more: Any) -> Any:
    png(folder / "a.png")
    row = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "3"}],
        "images": images,
        **more,
    }
    return write_lines(folder / "rows.jsonl", row)


@pytest.mark.parametrize(
    "mark",
    [
        *("<image_1>", "<Image>", "<img>", "[IMG]", "<|image_1|>", "<image 1>", "<image_placeholder>"),
        *("<ImageHere>", "<|image|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    ],
)
def test_another_programs_mark_is_an_image(mark: str, tmp_path: Any) -> None:
    path = rows(tmp_path, f"{mark}\nHow many?", ["a.png"])
    (row,) = read_whole(path)
    assert row["messages"][0] == turn("user", IMAGE, "How many?")
    assert row["reading_notes"] == (f"the mark {mark} is read as <image>",)


def test_other_marks_that_do_not_fit_the_images(tmp_path: Any) -> None:
    for question, images, reason in (
        ("<image_2> and <image_1>?", ["a.png", "a.png"], "holds <image_2>, another program's mark"),
        ("<image_1> and again <image_1>?", ["a.png"], "once for each image, in their order"),
        ("What is in <image_1>?", [], "holds <image_1>, a mark for an image, but the row has no image"),
    ):
        assert reason in read(rows(tmp_path, question, images))[0]["error"]
    assert read(rows(tmp_path, "What does <img> mean in HTML?", []))[0]["error"] is None


def test_an_image_that_the_text_names(tmp_path: Any) -> None:
    (row,) = read(rows(tmp_path, "Image 1: <img>a.png</img>\nHow many?", []))
    assert row["messages"][0] == turn("user", "Image 1: ", IMAGE, "\nHow many?")
    assert row["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("question", "more", "way_out"),
    [
        ("What happens?", {"clip": "clip.mp4"}, "frames as images"),
        ("<|video_pad|> What happens?", {}, "name videos in the field 'videos'"),
    ],
)
def test_videos_that_no_field_names_are_refused(
    question: str, more: dict[str, Any], way_out: str, tmp_path: Any
) -> None:
    assert way_out in read(rows(tmp_path, question, [], **more))[0]["error"]
