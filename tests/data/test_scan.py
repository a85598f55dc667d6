"""How data files are recognized and cut into fragments, and what is said of data that cannot be read."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats_kit import COUNT, HELLO, frames_folder, png, read, read_good, text, write_lines

from vlmtune.data import scan as scan_module
from vlmtune.data.scan import scan
from vlmtune.errors import DataError


def test_json_lines_in_a_json_file_and_other_names(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.txt", "rows.ndjson", "rows"):
        assert [row["source"] for row in read_good(write_lines(tmp_path / name, HELLO, HELLO))] == [
            f"{tmp_path}/{name}:1",
            f"{tmp_path}/{name}:2",
        ]
    (tmp_path / "array.jsonl").write_text(json.dumps([HELLO, HELLO], indent=1))
    assert [row["source"] for row in read_good(tmp_path / "array.jsonl")] == [
        f"{tmp_path}/array.jsonl[0]",
        f"{tmp_path}/array.jsonl[1]",
    ]


def test_fragments_of_a_large_file_know_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "BLOCK_BYTES", 1000)
    rows = [{"instruction": f"row {number}", "output": "x" * (number * 37 % 900)} for number in range(1, 101)]
    rows[40]["output"] = "y" * 5000
    path = write_lines(tmp_path / "rows.jsonl", *(item for row in rows for item in ("", row, "{broken")))
    fragments = scan(str(path))
    assert len(fragments) > 30
    assert [(fragment.start, fragment.stop) for fragment in fragments[1:]] == [
        (before.stop, fragment.stop) for before, fragment in pairwise(fragments)
    ]
    found = read(path)
    good = [row for row in found if row["error"] is None]
    assert [row["source"] for row in good] == [
        f"{path}:{3 * number - 1}" for number in range(1, 101) if rows[number - 1]["output"]
    ]
    assert [row["source"] for row in found if row["error"] and "not JSON" in row["error"]] == [
        f"{path}:{3 * number}" for number in range(1, 101)
    ]
    assert good[-1]["messages"][0]["content"] == [text("row 100")]


def test_folder_of_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.ndjson"):
        write_lines(tmp_path / name, HELLO)
    (tmp_path / "README.md").write_text("about")
    png(tmp_path / "frames" / "x.png")
    assert [row["source"] for row in read_good(tmp_path)] == [
        f"{tmp_path}/{name}:1" for name in ("a.jsonl", "b.jsonl", "c.ndjson")
    ]


WHOLE: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", "is empty"),
    "blank": ("rows.jsonl", b"\n \r\n", "is empty"),
    "BOM only": ("rows.json", b"\xef\xbb\xbf", "is empty"),
    "empty array": ("rows.json", b"[ ]", "is an empty array"),
    "UTF-16": ("rows.jsonl", json.dumps(HELLO).encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "object over lines": ("rows.json", b'{\n"data": [{"output": "a"}]\n}', "the rows are inside 'data'"),
    "false Parquet": ("rows.parquet", b"hello, hello", "is no Parquet file"),
    "cut Parquet": ("rows.parquet", b"PAR1 and no more", "cannot be read"),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n", "is no format that is understood. Understood: "),
    "CSV": ("rows.csv", b"a,b\n1,2\n", "has no columns with a question and its answer; it has: a, b"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_file_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    name, content, reason = WHOLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        scan(str(tmp_path / name))
    assert reason in str(caught.value)
    assert f"{tmp_path}/{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, reason in (
        ("rows.jsonl", "rows.jsonl: no such file or folder$"),
        ("./rows", "no such file or folder$"),
        (f"{tmp_path}/none", "no such file or folder$"),
        ("data/train", "no such file or folder in data/$"),
        ("a/b/c", "no such file or folder$"),
        ("foo://bucket/rows.jsonl", r"foo://bucket/rows.jsonl cannot be read: .*foo"),
        ("data", "data holds nothing, no data that is understood. Understood: a folder with frames/"),
    ):
        with pytest.raises(DataError, match=reason):
            scan(name)
    (tmp_path / "data" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"data holds notes.txt, no data that is understood"):
        scan("data")


def test_mixed_formats_and_unknown_columns(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", HELLO)
    pq.write_table(pa.table({"ask": ["a"], "say": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError,
        match=r"b.parquet has no columns with a question and its answer; it has: ask, say. "
        "Say which is which: --columns ",
    ):
        scan(str(tmp_path))
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"mixes formats: .*a.jsonl and .*b.parquet"):
        scan(str(tmp_path))
    pq.write_table(
        pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())}),
        tmp_path / "b.parquet",
    )
    with pytest.raises(DataError, match=r"b.parquet has no rows"):
        scan(str(tmp_path / "b.parquet"))


def test_group_by_that_does_not_exist(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path / "mall", COUNT, "id,count\n1,2\n")
    with pytest.raises(
        DataError, match=r"--group_by camera: .*labels.csv has no such column; it has: id, count"
    ):
        scan(str(folder), group_by="camera")
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"--group_by camera: .*b.parquet has no such column; it has: instruction, output"
    ):
        scan(str(tmp_path / "b.parquet"), group_by="camera")
