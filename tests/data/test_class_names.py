"""Numbers of a ClassLabel column are the names of their classes, in all that `datasets` writes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from formats_kit import png, read

from vlmtune.data.class_names import class_names
from vlmtune.data.question_columns import Columns
from vlmtune.data.scan import scan

NAMES = ["cat", "dog", "fish", "bird"]
ASK = Columns((), "Which animal is this?")


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    import datasets

    image = str(png(tmp_path / "a.png"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "count": datasets.Value("int64"),
        }
    )
    content = {"image": [image] * 3, "label": [2, 0, -1], "count": [2, 0, 1]}
    return datasets.Dataset.from_dict(content, features=features)


def answers(path: Path, columns: Columns) -> list[str]:
    rows = read(path, columns=columns)
    return [row["error"] or row["messages"][1]["content"][0]["text"] for row in rows]


@pytest.mark.parametrize("form", ["saved", "splits", "parquet"])
def test_labels_are_names(form: str, dataset: Any, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / ("rows.parquet" if form == "parquet" else "saved")
    if form == "parquet":
        dataset.to_parquet(str(path))
    else:
        data = dataset if form == "saved" else datasets.DatasetDict(train=dataset)
        data.save_to_disk(str(path))
    found = answers(path, ASK)
    assert found[:2] == ["fish", "cat"]
    assert "column 'label' holds the answer, but is empty" in found[2]
    assert answers(path, Columns((), "How many?", "count")) == ["2", "0", "1"]  # a plain number
    note = "column label: numbers are read as the names of their classes (cat, dog, fish and 1 more)"
    assert note in scan(str(path), columns=ASK)[0].reading_notes


def test_a_number_without_a_name_is_a_bad_row(dataset: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    table = pq.read_table(tmp_path / "rows.parquet")
    number = table.schema.get_field_index("label")
    broken = table.set_column(number, table.schema.field(number), pa.array([2, 7, 0]))
    pq.write_table(broken.replace_schema_metadata(table.schema.metadata), tmp_path / "rows.parquet")
    assert answers(tmp_path / "rows.parquet", ASK)[1] == "column 'label' is 7, and there are 4 classes"


@pytest.mark.parametrize(
    "metadata", [None, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"pandas": b"{}"}]
)
def test_other_schemas_have_none(metadata: dict[bytes, bytes] | None) -> None:
    assert class_names(pa.schema([("label", pa.int64())], metadata=metadata)) == {}
