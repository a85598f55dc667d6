"""The sample questions about construction terms."""

import json
import re
from pathlib import Path

from vlmtune.demo.instructions import write_instructions


def test_instructions_are_short_real_rows_in_two_languages(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "instructions.jsonl"
    write_instructions(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 60
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(
        isinstance(value, str) and value == value.strip() and 0 < len(value) < 120
        for row in rows
        for value in row.values()
    )
    assert sum(bool(re.search("[가-힣]", row["output"])) for row in rows) == 30
    assert len({row["output"] for row in rows}) == 60
    write_instructions(tmp_path / "again.jsonl")
    write_instructions(tmp_path / "other.jsonl", seed=1)
    assert (
        path.read_bytes()
        == (tmp_path / "again.jsonl").read_bytes()
        != (tmp_path / "other.jsonl").read_bytes()
    )


def test_no_unfinished_file_is_left(tmp_path: Path) -> None:
    write_instructions(tmp_path / "instructions.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["instructions.jsonl"]
