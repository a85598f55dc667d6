"""The files with all test answers."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
from page_kit import Links

from vlmtune.search.comparison import BASE, BASELINE, BEST, ComparedRow, compare_answers
from vlmtune.search.report.predictions import write_predictions

ROWS = [
    ComparedRow(
        0,
        "<script>alert(1)</script>",
        "3",
        {BEST: "3", BASELINE: "2", BASE: "=1+1"},
        source="data.jsonl:1",
        group="a",
        images=("한국.jpg", "b.jpg"),
    ),
    ComparedRow(1, "How many?", "4", {BEST: "5", BASELINE: "4", BASE: "<img src=x>"}, source="data.jsonl:2"),
]


def test_all_answers_are_written_three_times(tmp_path: Path) -> None:
    write_predictions(str(tmp_path), compare_answers(ROWS, ["a", "b"], 2, 0))
    table = pq.read_table(tmp_path / "test_predictions.parquet").to_pylist()
    assert table[0] == {
        "source": "data.jsonl:1",
        "images": "한국.jpg; b.jpg",
        "group": "a",
        "question": "<script>alert(1)</script>",
        "reference": "3",
        "answer": "3",
        "baseline_answer": "2",
        "base_answer": "=1+1",
        "exact_match": True,
    }
    with (tmp_path / "test_predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["base_answer"] == "'=1+1", "a spreadsheet must not run it"
    assert lines[1]["base_answer"] == "<img src=x>" and lines[0]["images"] == "한국.jpg; b.jpg"


def test_the_page_filters_and_texts_stay_texts(tmp_path: Path) -> None:
    write_predictions(str(tmp_path), compare_answers(ROWS, ["a", "b"], 2, 0))
    text = (tmp_path / "test_predictions.html").read_text(encoding="utf-8")
    assert Links(text).targets == [] and Links(text).tags.count("script") == 2
    assert "&lt;script&gt;alert(1)" in text and "<img" not in text
    assert '<tr data-kind="wrong">' in text and "2 rows, 1 answers differ" in text
    assert '<input id="filter"' in text
