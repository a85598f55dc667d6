"""Columns read as fields, and answers as words."""

from pathlib import Path
from typing import Any

import pytest
from formats_kit import png, read_good

from vlmtune.data.image_paths import RowError
from vlmtune.data.question_columns import Columns, plain_text
from vlmtune.data.scan import scan
from vlmtune.errors import DataError


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (3.0, "3"), (2.5, "2.5"), (True, "yes"), (False, "no"), (" two ", " two ")]
)
def test_an_answer_in_words(value: Any, text: str) -> None:
    assert plain_text(value, "count") == text


@pytest.mark.parametrize("value", [None, "", " ", float("nan"), ["a"], {"a": 1}])
def test_no_answer(value: Any) -> None:
    with pytest.raises(RowError, match=r"column 'count' holds the answer, but is .*: fill it in"):
        plain_text(value, "count")


def test_columns_of_a_row() -> None:
    row = {"photo": "a.png", "note": "x", "label": "cat"}
    assert Columns().apply(row) == {"image": "a.png", "note": "x", "label": "cat"}
    assert Columns((("image", "photo"),), "Which?").apply(row) == {
        "image": "a.png",
        "note": "x",
        "question": "Which?",
        "answer": "cat",
    }
    with pytest.raises(RowError, match=r"no column 'q' \(--columns question=q\)"):
        Columns((("question", "q"),)).apply(row)
    assert Columns((), "Which?", answers=False).apply({"image": "a.png"}) == {
        "image": "a.png",
        "question": "Which?",
    }


def test_names_of_columns_in_another_case(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    png(folder / "1.png")
    (folder / "a.csv").write_text("Image,Question,Answer\n1.png,How many?,3\n")
    (row,) = read_good(folder / "a.csv")
    assert row["messages"][1]["content"][0]["text"] == "3"
    assert row["images"] == [str(folder / "1.png")]
    (folder / "a.csv").write_text("Photo,How many cups?\n1.png,3\n")
    with pytest.raises(DataError) as error:
        scan(str(folder / "a.csv"))
    way_out = '--question "How many cups?" --answer_column "How many cups?"'
    assert str(error.value).endswith(f"Give a question: {way_out}")
    (row,) = read_good(folder / "a.csv", columns=Columns((), "How many cups?", "How many cups?"))
    assert (row["images"], row["error"]) == ([str(folder / "1.png")], None)
    (folder / "a.csv").write_text("Answer,answer,question\nwrong,right,What?\n")
    (row,) = read_good(folder / "a.csv")
    assert row["messages"][1]["content"][0]["text"] == "right"
