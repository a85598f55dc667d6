"""Columns read as fields, and answers as words."""

from typing import Any

import pytest

from vlmtune.data.image_paths import RowError
from vlmtune.data.question_columns import Columns, plain_text


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
