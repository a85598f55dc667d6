"""What there is to answer: images by name, rows with and without an answer, and what is wrong with a row."""

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.question_columns import Columns
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.questions import image_paths, question_fragments, read_questions, with_answer
from vlmtune.model_ref import ModelRef


def read_rows(fragments: Any, model: Path, after: int = 0) -> list[tuple[Any, Any]]:
    ref = ModelRef(str(model))
    rows = read_questions(fragments[0], 0, after, ref, find_input_format(ref.processor()))
    return [(pickle.loads(row["row"]), pickle.loads(row["example"])) for row in rows]


def test_images_of_a_folder_in_order_and_its_folders(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/2.png", "a/1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert image_paths(str(tmp_path)) == [f"{tmp_path}/{name}" for name in ("a/1.png", "a/2.png", "b.JPG")]
    assert image_paths(str(tmp_path / "b.JPG")) == [f"{tmp_path}/b.JPG"]
    assert image_paths(f"file://{tmp_path}/a") == [f"{tmp_path}/a/{number}.png" for number in (1, 2)]


def test_images_without_a_question_and_questions_without_images(tmp_path: Path, mall: Path) -> None:
    with pytest.raises(ConfigError, match=r"--question is missing: .*frames holds images and no questions"):
        question_fragments(str(mall / "frames"), None)
    with pytest.raises(
        DataError,
        match=rf"--data_path {tmp_path}: there is no image \(\.jpg, .*so there is nothing to ask about",
    ):
        question_fragments(str(tmp_path), "How many?")
    with pytest.raises(DataError, match="holds nothing"):
        question_fragments(str(tmp_path), None)
    with pytest.raises(DataError, match=r"absent: there is no image"):
        question_fragments(str(tmp_path / "absent"), "How many?")


def test_a_damaged_image_is_a_row_with_a_reason(tmp_path: Path, mall: Path, models: Path) -> None:
    (tmp_path / "1.jpg").write_bytes((mall / "frames" / "seq_000001.jpg").read_bytes())
    (tmp_path / "2.jpg").write_bytes(b"no image")
    (good, example), (bad, nothing) = read_rows(
        question_fragments(str(tmp_path), "How many?"), models / "llava"
    )
    assert (good.source, good.images, good.error, good.has_reference) == (
        f"{tmp_path}/1.jpg",
        [f"{tmp_path}/1.jpg"],
        None,
        False,
    )
    assert example.image_tokens > 0
    assert nothing is None
    assert bad.error == f"image {tmp_path}/2.jpg: not an image"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"instruction": "How many?"}, "output"),
        ({"instruction": "How many?", "output": ""}, "output"),
        ({"messages": [{"role": "user", "content": "How many?"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "How many?"}]}, "conversations"),
        ({"prompt": [{"role": "user", "content": "How many?"}]}, "completion"),
    ],
)
def test_rows_without_an_answer_are_asked(
    record: dict[str, Any], field: str, tmp_path: Path, models: Path
) -> None:
    assert with_answer(record)[field] != record.get(field)
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    ((row, example),) = read_rows(question_fragments(str(tmp_path / "d.jsonl"), None), models / "llava")
    assert (row.error, row.has_reference) == (None, False)
    assert len(example.prompt().input_ids) > 3


def test_rows_with_an_answer_keep_it_and_reading_goes_on_after_a_row(mall: Path, models: Path) -> None:
    fragments = question_fragments(str(mall), None)
    rows = read_rows(fragments, models / "llava")
    assert len(rows) == 48
    assert all(row.has_reference and row.error is None for row, _ in rows)
    later = read_rows(fragments, models / "llava", after=40)
    assert [row for row, _ in later] == [row for row, _ in rows[40:]]


def test_a_table_of_questions_without_answers(tmp_path: Path, models: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("photo,question\na.png,What?\n")
    fragments = question_fragments(
        str(tmp_path / "rows.csv"), None, columns=Columns((("image", "photo"),), answers=False)
    )
    ((row, example),) = read_rows(fragments, models / "llava")
    assert (row.source, row.images, row.has_reference, row.error) == (
        f"{tmp_path}/rows.csv:2",
        [f"{tmp_path}/a.png"],
        False,
        None,
    )
    assert example is not None


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"")
    for number in range(12):
        (folder / "a" / "b" / f"up{number}").symlink_to(folder)
        (folder / "a" / f"self{number}").symlink_to(folder / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "2.png").write_bytes(b"")
    (folder / "more").symlink_to(tmp_path / "other")
    start = time.monotonic()
    assert image_paths(str(folder)) == [f"{folder}/a/1.png", f"{folder}/more/2.png"]
    assert time.monotonic() - start < 1
