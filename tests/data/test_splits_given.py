"""Splits that the data itself gives."""

import pytest
from formats_kit import COUNT, HELLO, frames_folder, read_whole, write_lines

from vlmtune.data.splits_given import split_column, split_field, split_of_name


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("val.jsonl", "eval"),
        ("my-dev-set.json", "eval"),
        ("captions_val2017.json", "eval"),
        ("test-00000-of-00001.parquet", "test"),
        ("검증.jsonl", "eval"),
        ("validation", "eval"),
        ("rows.jsonl", None),
        ("latest.jsonl", None),
        ("train_test.jsonl", None),
        ("contest.json", None),
    ],
)
def test_names_of_files(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


def test_fields_and_columns() -> None:
    assert split_field({"split": "Validation"}) == ("split", "eval")
    assert split_field({"subset": "red", "split": 3}) is None
    assert split_column(["image", "Split"], [["a", "train"], ["b", ""], ["c", "test"]]) == "Split"
    assert split_column(["image", "split"], [["a", "train"], ["b", "7"]]) is None


def test_rows_know_their_split(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(tmp_path / name, HELLO, {**HELLO, "split": "val"})
    assert [row["split"] for row in read_whole(tmp_path)] == ["test", "eval", "train", "eval"]
    assert [row["split"] for row in read_whole(tmp_path / "test.jsonl")] == [None, "eval"]
    folder = frames_folder(tmp_path / "mall", COUNT, "id,count,split\n1,2,train\n2,3,test\n")
    assert [row["split"] for row in read_whole(folder)] == ["train", "test"]
