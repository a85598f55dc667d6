import json
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from vlmtune.checksums import CHECKSUMS, damaged_file, write_checksums


def test_a_file_that_changed_is_named(tmp_path: Path) -> None:
    local = pafs.LocalFileSystem()
    for name in ("a.bin", "b.json"):
        (tmp_path / name).write_text(f"content of {name}")
    write_checksums(tmp_path, later_json="written later")
    assert damaged_file(local, str(tmp_path)) == "later.json"
    (tmp_path / "later.json").write_text("written later")
    assert damaged_file(local, str(tmp_path)) is None
    (tmp_path / "b.json").write_text("content of B.json")
    assert damaged_file(local, str(tmp_path)) == "b.json"
    (tmp_path / CHECKSUMS).write_text("{")
    assert damaged_file(local, str(tmp_path)) == CHECKSUMS


@pytest.mark.parametrize(
    "sums", [[], 5, {"../outside": [1, "x"]}, {"a": 5}, {"a": []}, {"missing": [1, "x"]}]
)
def test_checksums_of_another_form_name_themselves_or_what_is_missing(sums: object, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / CHECKSUMS).write_text(json.dumps(sums))
    found = damaged_file(pafs.LocalFileSystem(), str(tmp_path))
    assert found == ("missing" if sums == {"missing": [1, "x"]} else CHECKSUMS)
