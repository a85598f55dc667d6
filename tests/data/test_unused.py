"""What nothing uses is named, and a row that would be misread is bad."""

from pathlib import Path
from typing import Any

import pytest
from formats_kit import HELLO, png, read, read_whole, turn, write_lines


def one(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    png(folder / "a.png")
    (found,) = read_whole(write_lines(folder / "rows.jsonl", row))
    return found


def test_fields_that_nothing_uses_are_named(tmp_path: Path) -> None:
    more = {"id": 7, "weight": 0.5, "empty": "", "none": None, "list": [], "split": "test", "camera": "a"}
    found = one(tmp_path, {**HELLO, "image": "a.png", "mask": "b.png", **more})
    assert found["unused"] == ("field mask", "field id", "field weight", "field camera")
    assert found["split"] == "test"
    (grouped,) = read_whole(tmp_path / "rows.jsonl", group_by="camera")
    assert "field camera" not in grouped["unused"]
    two_formats = one(tmp_path, {"messages": [turn("user", "a"), turn("assistant", "b")], **HELLO})
    assert two_formats["unused"] == ("field instruction", "field output")


@pytest.mark.parametrize(
    "more",
    [
        {"still": "images/1.WEBP"},
        {"photos": ["x.png", "y.png"]},
        {"pic_file": {"path": "a.png"}},
        {"img": "data:image/png;base64,AA=="},
        {"audio": ["a.wav"]},
        {"source": "clip.mov"},
    ],
)
def test_a_row_is_not_trained_on_without_its_image(more: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(more))
    assert f"field {name!r}" in one(tmp_path, {**HELLO, **more})["error"]
    assert one(tmp_path, {**HELLO, "image": "a.png", **more})["error"] is None


def test_attributes_of_turns(tmp_path: Path) -> None:
    question = {"role": "user", "content": "a", "name": "Kim"}
    found = one(tmp_path, {"messages": [question, {"role": "assistant", "content": "b", "weight": 1}]})
    assert (found["error"], found["unused"]) == (None, ("turn attribute name",))
    for more, reason in (
        ({"weight": 0}, "messages[1].weight is 0: every assistant turn is trained on"),
        ({"loss": False}, "messages[1].loss is False"),
        ({"tool_calls": [{"id": 1}]}, "messages[1].tool_calls: calls of tools are not supported"),
    ):
        row = {"messages": [question, {"role": "assistant", "content": "b", **more}]}
        assert reason in one(tmp_path, row)["error"]


def test_the_history_of_alpaca_is_part_of_the_conversation(tmp_path: Path) -> None:
    row = {**HELLO, "history": [["<image>How many?", 3]], "images": ["a.png"]}
    found = one(tmp_path, row)
    image = {"type": "image"}
    assert found["messages"] == [
        turn("user", image, "How many?"),
        turn("assistant", "3"),
        turn("user", "Say hello"),
        turn("assistant", "Hello"),
    ]
    write_lines(tmp_path / "rows.jsonl", {**HELLO, "history": ["How many?"]})
    assert "history[0] must be a question and its answer" in read(tmp_path / "rows.jsonl")[0]["error"]


def test_values_that_are_read_in_another_way_are_noted(tmp_path: Path) -> None:
    for output, answer, note in (
        (3, "3", "numbers are read as their digits"),
        (3.0, "3", "numbers are read as their digits"),
        (2.5, "2.5", "numbers are read as their digits"),
        ("3<|im_end|>", "3<|im_end|>", "<|im_end|>, an end token of some models"),
        ("nan", "nan", "an answer is 'nan' and is learnt as this word"),
    ):
        found = one(tmp_path, {"instruction": "How many?", "output": output})
        assert found["messages"][1] == turn("assistant", answer)
        assert found["reading_notes"][0].startswith(note)
