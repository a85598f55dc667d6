"""One raw row → its index line and its example, or the reason why it is bad."""

import json
from pathlib import Path
from typing import Any

import pytest
from formats_kit import HELLO, png, read_whole, write_lines

from vlmtune.data.examples import encode_row
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model_ref import ModelRef


@pytest.fixture(scope="module")
def encoder(models: Path) -> RowEncoder:
    return RowEncoder(ModelRef(str(models / "llava")).processor())


def lines_of(encoder: RowEncoder, path: Path, **options: Any) -> list[dict[str, Any]]:
    """The index lines of a file's rows; those of bad rows have no example."""
    encoded = [encode_row(encoder, row) for row in read_whole(path, **options)]
    for line, example in encoded:
        assert (example is None) == (line["error"] is not None)
        json.dumps(line)  # tasks send lines as JSON
    return [line for line, _ in encoded]


def test_a_good_row(encoder: RowEncoder, tmp_path: Path) -> None:
    image = png(tmp_path / "a.png")
    path = write_lines(tmp_path / "rows.jsonl", {**HELLO, "image": "a.png"}, HELLO, HELLO)
    line, plain, same = lines_of(encoder, path)
    assert (line["source"], line["images"]) == (f"{path}:1", [str(image)])
    assert line["tokens"] > line["required"] > line["image_tokens"] == 16
    assert 0 < line["answer_tokens"] < line["tokens"] - line["image_tokens"]
    assert (line["turns"], line["image_sizes"], line["image_formats"]) == (2, ["8x8"], ["PNG"])
    assert line["group_keys"] == line["image_hashes"]
    assert plain["image_tokens"] == 0
    assert plain["group_keys"] == same["group_keys"] != line["group_keys"]


def test_a_group_is_a_key_of_its_own(encoder: RowEncoder, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {**HELLO, "camera": 7})
    (line,) = lines_of(encoder, path, group_by="camera")
    assert len(line["group_keys"]) == 2 and line["group_keys"][1] == "group 7"


def test_bad_rows_have_a_reason_and_its_kind(encoder: RowEncoder, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        {**HELLO, "image": "gone.png"},
        {**HELLO, "output": "Hello</s>"},
        {"instruction": "Say hello"},
    )
    image, text, record = lines_of(encoder, path)
    assert image["error"] == (
        f"image {tmp_path}/gone.png: there is no such file (paths start from {tmp_path}; "
        "--image_root names another folder)"
    )
    assert image["error_kind"] == (
        "image … there is no such file (paths start from … --image_root names another folder)"
    )
    assert text["error"] == text["error_kind"]
    assert text["error"].startswith("the text contains '</s>', a special token")
    assert record["error"] == "instruction row without 'output'"
