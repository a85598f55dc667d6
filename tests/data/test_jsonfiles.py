"""JSONL files and JSON arrays: encodings, blank and long lines, arrays that break off."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from formats_kit import HELLO, read, read_good, text

from vlmtune.data.jsonfiles import StrictDecoder
from vlmtune.errors import DataError


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
    assert [row["source"] for row in read_good(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
    ]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[\r\n" + line + b",\r\n" + line + b"\r\n]\r\n")
    assert len(read_good(tmp_path / "a.json")) == 2


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode()
    broken = line.replace(b"Hello", b"H\xe9llo")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([line, broken, line]))
    rows = read(tmp_path / "a.jsonl")
    assert [row["error"] for row in rows] == [
        None,
        "byte 42 of the line is not UTF-8: save the file as UTF-8",
        None,
    ]
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([line, broken, line]) + b"]")
    rows = read(tmp_path / "a.json")
    assert [row["error"] for row in rows] == [
        None,
        "'output' holds bytes that are not UTF-8: save the file as UTF-8",
        None,
    ]


def test_line_that_is_too_long(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode() + b"\n"
    for place, content in (
        ("middle", line + b"x" * 50_000_000 + b"\n" + line),
        ("end", line + line.replace(b"Hello", b"x" * 17_000_000).rstrip()),
    ):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(content)
        rows = read(path)
        assert rows[1]["source"] == f"{path}:2"
        assert rows[1]["error"] == "the line is longer than 16 MB: keep images in files, not in the text"
        assert [row["source"] for row in rows if row["error"] is None] == [
            f"{path}:{number}" for number in ((1, 3) if place == "middle" else (1,))
        ]


BROKEN_ARRAYS = {
    "missing comma": (
        '[\n {"instruction": "Say hello", "output": "Hello"}\n  {}]',
        1,
        "line 3, column 3: expected , or ]",
    ),
    "cut off": (
        '[{"instruction": "Say hello", "output": "Hello"},\n {"instruction": "a',
        1,
        "line 2, column 18: Unterminated string starting at",
    ),
    "not closed": (
        '[{"instruction": "Say hello", "output": "Hello"}\n',
        1,
        "line 2, column 1: expected , or ]",
    ),
    "more after it": (
        '[{"instruction": "Say hello", "output": "Hello"}] x',
        1,
        "line 1, column 51: more text after the end of the array",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
def test_broken_array_is_an_error_whatever_came_before(case: str, tmp_path: Path) -> None:
    content, index, reason = BROKEN_ARRAYS[case]
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}[{index}]: not JSON at {reason}; nothing after it in this file can be read: repair the file"
    )


FORMS = {
    "comma at the end": "[{row},\n{row},\n]",
    "commas after lines": "{row},\n{row},\n",
    "indented objects": "{indented}\n{indented}\n",
    "indented objects with commas": "{indented},\n{indented}",
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_json_are_read(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    content = FORMS[form].replace("{row}", json.dumps(HELLO))
    path.write_text(content.replace("{indented}", json.dumps(HELLO, indent=4)))
    assert len(read_good(path)) == 2


@pytest.mark.parametrize("number", [2, 2000])
def test_files_that_hold_their_rows_inside(number: int, tmp_path: Path) -> None:
    rows = [HELLO] * number
    columns = {"instruction": {str(n): "a" for n in range(number)}, "output": {"0": "b"}}
    for suffix in ("json", "jsonl"):
        path = tmp_path / f"rows.{suffix}"
        for content, indent, reason in (
            ({"version": 1, "data": rows}, 2, "the rows are inside 'data': give that array alone"),
            ({"data": rows}, None, "the rows are inside 'data'"),
            (columns, None, r"write rows with to_json\(orient='records'\)"),
        ):
            path.write_text(json.dumps(content, indent=indent))
            with pytest.raises(DataError, match=reason):
                read(path)


def test_gzip_and_pythons_notation(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(HELLO).encode()))
    with pytest.raises(DataError, match="is compressed with gzip: unpack it with gunzip"):
        read(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.jsonl").write_text(f"{HELLO}\n{HELLO}\n")
    assert (
        "Python's own notation is not JSON: write rows with json.dumps"
        in read(tmp_path / "rows.jsonl")[0]["error"]
    )


def test_long_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.jsonfiles.READ_BYTES", 50)
    rows: list[Any] = [
        {"instruction": f"행 {number}", "output": "x" * (number * 53 % 700 + 1)} for number in range(60)
    ]
    rows[30] = 12345678901234567890
    path = tmp_path / "rows.json"
    content = json.dumps(rows, ensure_ascii=False, indent=1)
    path.write_text(content + "\n\n ?")
    with pytest.raises(DataError, match=rf"at line {len(content.splitlines()) + 2}, column 2: more text"):
        read(path)
    path.write_text(content)
    found = read(path)
    assert [row["source"] for row in found] == [f"{path}[{number}]" for number in range(60)]
    assert [number for number, row in enumerate(found) if row["error"]] == [30]
    assert found[59]["messages"][0]["content"] == [text("행 59")]


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    text = json.dumps({f"k{number}": 0 for number in range(60_000)})[:-1] + ', "k59999": 1}'
    start = time.monotonic()
    *_, fault = StrictDecoder().decode(text)
    assert fault == "field 'k59999' stands twice in one object: keep one"
    assert time.monotonic() - start < 1
