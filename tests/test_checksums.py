from pathlib import Path

import pyarrow.fs as pafs

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
