"""Parts of predictions: written in order, found again, and joined into one file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmtune.evaluation import prediction_parts
from vlmtune.evaluation.prediction_parts import (
    join_parts,
    list_parts,
    next_row,
    read_predictions,
    write_parts,
)
from vlmtune.evaluation.questions import QuestionRow


def results(*places: tuple[int, int]) -> Iterator[tuple[QuestionRow, Any]]:
    """Answered rows at these (fragment, number) places; every third one has an error instead."""
    for fragment, number in places:
        error = "no image" if number % 3 == 2 else None
        row = QuestionRow(fragment, number, f"{fragment}:{number}", [None], number % 2 == 0, error)
        answer = {"question": "How many?", "reference": "3", "base": {"answer": str(number)}}
        yield row, None if error else answer


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_parts_are_joined_in_order(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_parts, "ROWS_PER_PART", 2)
    folder = str(tmp_path)
    assert next_row(folder) == (0, 0)
    write_parts(folder, results((0, 0), (0, 1), (0, 2)), "base")
    assert [Path(part).name for part in list_parts(folder)] == [
        "000000-000000000001.jsonl",
        "000000-000000000002.jsonl",
    ]
    assert next_row(folder) == (0, 3)
    write_parts(folder, results((0, 3), (1, 0)), "base")
    assert next_row(folder) == (1, 1)
    path, rows, errors = join_parts(folder, form)
    assert (path, rows, errors) == (f"{folder}/predictions.{form}", 5, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"predictions.{form}"]
    frame = read_predictions(path).fillna("")
    assert frame["source"].tolist() == ["0:0", "0:1", "0:2", "0:3", "1:0"]
    assert frame["answer"].tolist() == ["0", "1", "", "3", "0"]
    assert frame["reference"].tolist() == ["3", "", "", "", "3"]
    assert frame["error"].tolist() == ["", "", "no image", "", ""]


def test_rows_out_of_order_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0:0 came after 0:1: a resumed run would lose rows"):
        write_parts(str(tmp_path), results((0, 1), (0, 0)), "base")


def test_a_part_holds_a_line_for_each_row(tmp_path: Path) -> None:
    write_parts(str(tmp_path), results((0, 0)), "base")
    (part,) = list_parts(str(tmp_path))
    assert json.loads(Path(part).read_text()) == {
        "source": "0:0",
        "images": [None],
        "question": "How many?",
        "answer": "0",
        "reference": "3",
        "error": None,
    }
