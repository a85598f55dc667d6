"""Rows of every shape in every container are read as the same conversations."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats_kit import ANSWERED, ASKED, HELLO, IMAGE, Row, png, read, text, turn, write_lines

from vlmtune.data.formats import read_fragment
from vlmtune.data.scan import scan
from vlmtune.errors import DataError

SHAPES: dict[str, tuple[Row, list[Row], list[str]]] = {
    "instruction": (HELLO, [ASKED, ANSWERED], []),
    "instruction, empty input": ({**HELLO, "input": ""}, [ASKED, ANSWERED], []),
    "instruction, null input": ({**HELLO, "input": None}, [ASKED, ANSWERED], []),
    "instruction with input": (
        {**HELLO, "input": "in Korean"},
        [turn("user", "Say hello\nin Korean"), ANSWERED],
        [],
    ),
    "instruction with image": (
        {**HELLO, "image": "a.png"},
        [turn("user", IMAGE, "Say hello"), ANSWERED],
        ["a.png"],
    ),
    "instruction with images": (
        {"instruction": "Compare <image> with <image>.", "output": "Same", "images": ["a.png", "sub/b.png"]},
        [turn("user", "Compare ", IMAGE, " with ", IMAGE, "."), turn("assistant", "Same")],
        ["a.png", "sub/b.png"],
    ),
    "instruction with system": (
        {**HELLO, "system": "Be brief"},
        [turn("system", "Be brief"), ASKED, ANSWERED],
        [],
    ),
    "messages, strings": (
        {
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": " A cat "},
            ],
            "images": ["a.png"],
        },
        [turn("system", "Be brief"), turn("user", IMAGE, "What?"), turn("assistant", " A cat ")],
        ["a.png"],
    ),
    "messages, no marks": (
        {
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Cats"}],
            "images": ["a.png", "sub/b.png"],
        },
        [turn("user", IMAGE, IMAGE, "What?"), turn("assistant", "Cats")],
        ["a.png", "sub/b.png"],
    ),
    "messages, typed": (
        {
            "messages": [
                {"role": "user", "content": [text("Look"), IMAGE, text("What?")]},
                {"role": "assistant", "content": [text("A cat")]},
            ],
            "images": ["a.png"],
        },
        [turn("user", "Look", IMAGE, "What?"), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "messages, inline images mixed with marks": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "sub/b.png"}, IMAGE, text("What?")]},
                {"role": "assistant", "content": "Cats"},
                {"role": "user", "content": "And <image>"},
                {"role": "assistant", "content": "Dogs"},
            ],
            "images": ["a.png", "c.png"],
        },
        [
            turn("user", IMAGE, IMAGE, "What?"),
            turn("assistant", "Cats"),
            turn("user", "And", IMAGE),
            turn("assistant", "Dogs"),
        ],
        ["sub/b.png", "a.png", "c.png"],
    ),
    "prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "Say hello"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
        [ASKED, ANSWERED],
        [],
    ),
    "LLaVA": (
        {
            "id": 7,
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What?\n<image>"},
                {"from": "gpt", "value": "A cat"},
            ],
        },
        [turn("user", "What?", IMAGE), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "LLaVA, no mark": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "A cat"},
            ],
        },
        [turn("user", IMAGE, "What?"), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "LLaVA, null image": (
        {
            "image": None,
            "conversations": [{"from": "human", "value": "Say hello"}, {"from": "gpt", "value": "Hello"}],
        },
        [ASKED, ANSWERED],
        [],
    ),
}

CONTAINERS = [(shape, container) for shape in SHAPES for container in ("jsonl", "json", "saved", "parquet")]
CONTAINERS.remove(("messages, inline images mixed with marks", "parquet"))  # has one type for all contents


@pytest.mark.parametrize(("shape", "container"), CONTAINERS)
def test_every_shape_in_every_container(shape: str, container: str, tmp_path: Path) -> None:
    record, messages, images = SHAPES[shape]
    path = tmp_path / f"rows.{container}"
    source = {"jsonl": f"{path}:1", "json": f"{path}[0]"}.get(container, f"{path} row 0")
    if container == "jsonl":
        write_lines(path, record)
    elif container == "json":
        path.write_text(json.dumps([record], indent=2))
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        import datasets

        datasets.Dataset.from_list([record], on_mixed_types="use_json").save_to_disk(str(path))
    root = path if container == "saved" else tmp_path
    expected = {
        "source": source,
        "messages": messages,
        "images": [str(root / name) for name in images],
        "group": None,
        "error": None,
    }
    assert read(path) == [expected]


def test_source_is_as_the_user_wrote_it_and_paths_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "rows.jsonl", {**HELLO, "image": "a b.png"})
    for given in (
        "data/rows.jsonl",
        "./data/rows.jsonl",
        "data/",
        (tmp_path / "data" / "rows.jsonl").as_uri(),
    ):
        fragments = scan(given)
        monkeypatch.chdir("/")
        (row,) = read_fragment(fragments[0])
        monkeypatch.chdir(tmp_path)
        assert row["source"] == ("data/rows.jsonl:1" if given == "data/" else f"{given}:1")
        assert row["images"] == [str(tmp_path / "data" / "a b.png")]


def test_parquet_images_as_paths_bytes_and_structs(tmp_path: Path) -> None:
    data = png(tmp_path / "a.png").read_bytes()
    columns: dict[str, list[Any]] = {
        "path": ["a.png"] * 3,
        "bytes": [data] * 3,
        "struct": [
            {"bytes": data, "path": "gone.png"},
            {"bytes": None, "path": "a.png"},
            {"bytes": None, "path": None},
        ],
        "list": [["a.png", "a.png"], [], None],
        "structs": [[{"bytes": data, "path": None}], [{"bytes": None, "path": "a.png"}], None],
    }
    found = {}
    for name, values in columns.items():
        path = tmp_path / f"{name}.parquet"
        table = pa.table(
            {
                "instruction": ["Q"] * 3,
                "output": ["A"] * 3,
                "images" if "s" in name[4:] or name == "list" else "image": values,
            }
        )
        pq.write_table(table, path, row_group_size=2)
        assert len(scan(str(path))) == 2
        found[name] = read(path)
        assert [row["source"] for row in found[name]] == [f"{path} row {number}" for number in range(3)]
    here = str(tmp_path / "a.png")
    assert [row["images"] for row in found["path"]] == [[here]] * 3
    assert [row["images"] for row in found["bytes"]] == [[data]] * 3
    assert [row["images"] for row in found["struct"]] == [[data], [here], []]
    assert [row["error"] for row in found["struct"]] == [None, None, "image holds neither bytes nor a path"]
    assert [row["images"] for row in found["list"]] == [[here, here], [], []]
    assert [row["images"] for row in found["structs"]] == [[data], [here], []]


def test_file_that_vanishes_after_the_scan(tmp_path: Path) -> None:
    fragments = scan(str(write_lines(tmp_path / "rows.jsonl", HELLO)))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows.jsonl cannot be read"):
        list(read_fragment(fragments[0]))
