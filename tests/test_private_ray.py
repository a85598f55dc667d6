"""Where a Ray that vlmtune starts keeps its files: which folder, who may enter it, and its token."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmtune.errors import ResourceError
from vlmtune.private_ray import (
    MAX_TEMP_DIR,
    MAX_TMPDIR,
    make_private_temp_dir,
    make_private_token,
    short_tmpdir,
)


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder that everybody may write to, in RAY_TMPDIR."""
    folder = Path(f"/tmp/t{os.getpid() % 10000}")
    folder.mkdir(mode=0o777)
    folder.chmod(0o1777)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    for own in folder.iterdir():
        for file in own.iterdir():
            file.unlink()
        own.rmdir()
    folder.rmdir()


def test_only_this_user_enters_rays_folder(short: Path) -> None:
    make_private_temp_dir()
    own = os.environ["RAY_TMPDIR"]
    assert (own, mode(own)) == (f"{short}/ray-{os.geteuid()}", 0o700)
    make_private_temp_dir()
    assert os.environ["RAY_TMPDIR"] == own, "a process may call it again"


def test_a_folder_that_others_may_enter_is_not_taken(short: Path) -> None:
    (short / f"ray-{os.geteuid()}").mkdir(mode=0o755)
    make_private_temp_dir()
    own = os.environ["RAY_TMPDIR"]
    assert own != f"{short}/ray-{os.geteuid()}"
    assert own.startswith(f"{short}/ray-") and mode(own) == 0o700 and len(own) <= MAX_TEMP_DIR


def test_sockets_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "t" * 99)
    make_private_temp_dir()
    assert os.environ["RAY_TMPDIR"].startswith("/tmp/ray-")


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(ResourceError, match="RAY_TMPDIR /proc/none: cannot be written"):
        make_private_temp_dir()


@pytest.mark.parametrize("before", [None, 0o644])
def test_the_token_is_for_this_user_alone(
    before: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    token = tmp_path / ".ray" / "auth_token"
    if before is not None:
        token.parent.mkdir()
        token.write_text("theirs")
        token.chmod(before)
    make_private_token()
    assert mode(token) == 0o600
    assert token.read_text() == "theirs" if before is not None else len(token.read_text()) == 64
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_without_a_home_the_token_is_in_rays_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # taken back after the test
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    make_private_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/auth_token"
    assert mode(tmp_path / "auth_token") == 0o600


@pytest.mark.parametrize("length", [MAX_TMPDIR, MAX_TMPDIR + 1, 300])
def test_sockets_of_rays_processes_fit_below_a_long_tmpdir(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    given = "/" + "t" * (length - 1)
    monkeypatch.setenv("TMPDIR", given)
    with short_tmpdir():
        assert os.environ["TMPDIR"] == (given if length <= MAX_TMPDIR else "/tmp/short")
        assert len(f"{os.environ['TMPDIR']}/pymp-12345678/listener-12345678") < 108
    assert os.environ["TMPDIR"] == given
