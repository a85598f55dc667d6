"""Paths and URIs behind one interface, and files that are written whole or not at all."""

import json
import stat
from pathlib import Path

import pytest

from vlmtune import storage


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("s3://bucket/out", "s3"),
        ("FILE:///out", "file"),
        ("data:image/png;base64,AAAA", "data"),
        ("/out", ""),
        ("out:1/rows", ""),
        ("C:/out", ""),
    ],
)
def test_the_scheme_of_a_uri(path: str, scheme: str) -> None:
    assert storage.scheme(path) == scheme


def test_a_path_becomes_absolute_and_a_uri_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.absolute("out/../run") == str(tmp_path / "run")
    assert storage.absolute("~/run") == "/home/me/run"
    assert storage.absolute("file:///a%20b/") == "/a b"
    assert storage.absolute("file://localhost/run") == "/run"
    assert storage.absolute("s3://bucket/run/") == "s3://bucket/run"
    with pytest.raises(ValueError, match="the host 'other'"):
        storage.absolute("file://other/run")


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("/data/rows", "a b.jpg", "/data/rows/a b.jpg"),
        ("s3://bucket/rows/", "a b.jpg", "s3://bucket/rows/a%20b.jpg"),
        ("s3://bucket/rows?region=eu-west-1", "1.jpg", "s3://bucket/rows/1.jpg?region=eu-west-1"),
    ],
)
def test_a_name_below_a_folder_and_the_way_back(folder: str, name: str, joined: str) -> None:
    assert storage.join(folder, name) == joined
    assert storage.parent(joined) == folder.replace("/?", "?").removesuffix("/")


def test_a_file_system_is_opened_once(tmp_path: Path) -> None:
    files, inner = storage.filesystem((tmp_path / "a b").as_uri())
    assert inner == str(tmp_path / "a b")
    assert files.get_file_info(inner).type.name == "NotFound"
    first, inner = storage.filesystem("mock://bucket/rows")
    assert inner == "/rows"
    assert storage.filesystem("mock://bucket/other")[0] is first
    with pytest.raises((ValueError, NotImplementedError)):
        storage.filesystem("nowhere://bucket/rows")


def test_an_error_fits_on_one_line() -> None:
    assert storage.one_line(OSError("no\n  such file")) == "no such file"
    assert storage.one_line(TimeoutError()) == "TimeoutError"


def test_a_write_replaces_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "metrics.json"
    assert not storage.exists(str(path))
    storage.write_json(str(path), {"loss": 1.5, "text": "사람", "path": tmp_path})
    assert json.loads(storage.read_text(path.as_uri())) == {
        "loss": 1.5,
        "text": "사람",
        "path": str(tmp_path),
    }
    with pytest.raises(UnicodeEncodeError):
        storage.write_text(str(path), "half \ud800")
    assert json.loads(path.read_text(encoding="utf-8"))["loss"] == 1.5
    storage.write_text(str(path), "other")
    assert path.read_text() == "other"
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]
    assert storage.exists(str(path))
    assert not storage.exists(str(path.parent))


def test_files_get_the_mode_that_new_files_have(tmp_path: Path) -> None:
    new, private = tmp_path / "new", tmp_path / "private"
    for path in (new, private):
        path.write_text("weights")
    private.chmod(0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    storage.apply_umask(tmp_path)
    assert stat.S_IMODE(private.stat().st_mode) == stat.S_IMODE(new.stat().st_mode)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_a_link_in_the_place_of_a_part_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.json.part").symlink_to(tmp_path / "mine")
    storage.write_text(str(tmp_path / "a.json"), "text")
    assert ((tmp_path / "mine").read_text(), (tmp_path / "a.json").read_text()) == ("mine", "text")


def test_file_states_change_with_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    before = storage.file_states([str(path), str(other), "https://example.org/c.png"])
    assert [name for name, _ in before] == [str(path), str(other)], "a web address has no state"
    path.write_bytes(b"three")
    other.touch()
    after = storage.file_states([str(path), str(other)])
    assert before[0] != after[0]
    other.unlink()
    assert storage.file_states([str(other)])[0] != after[1]
