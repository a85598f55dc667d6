"""Folders of another user: refused where their settings would be followed."""

import os
from pathlib import Path

import pytest

from vlmtune import run_state
from vlmtune.cli.ui import ui
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.folder_owner import check_owner
from vlmtune.output import settings_yaml
from vlmtune.run_state import SEARCH
from vlmtune.search.salvage import salvage
from vlmtune.search.space import Space
from vlmtune.search.warm_start import read_earlier_trials
from vlmtune.session import Session

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
STRANGER = 12345


@pytest.fixture
def search(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    run_state.write(
        str(folder), SEARCH, Settings.from_flags({"model_name_or_path": "owner/base"}), "of the rows"
    )
    return folder


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def test_ones_own_folder_roots_and_uris_are_read(search: Path) -> None:
    check_owner(str(search), "--resume", ["search.yaml", "missing"])
    check_owner("/etc", "--resume", ["passwd"])
    check_owner("s3://bucket/out", "--resume", ["search.yaml"])


@needs_root
@pytest.mark.parametrize("part", [".", "search.yaml", "tune/data.json"])
def test_a_search_of_another_user_is_not_resumed(search: Path, part: str) -> None:
    give_away(search / part)
    settings = Settings.from_flags({"resume": str(search)})
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345\).*--trust_folder"):
        Session.open(settings, SEARCH, lambda _: None)
    assert not (search / ".lock").exists()

    def stop(_: Settings) -> None:
        raise InterruptedError  # the folder has been read

    with pytest.raises(InterruptedError):
        Session.open(settings.replace(trust_folder=True), SEARCH, stop)


@needs_root
def test_neither_is_it_salvaged_nor_taken_over_nor_shown(
    search: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    give_away(search / "search.yaml")
    with pytest.raises(ConfigError, match=r"--resume .*search\.yaml belongs to another user"):
        salvage(Settings.from_flags({"resume": str(search)}))
    settings = Settings.from_flags(
        {"warm_start": [str(search)], "search_space": {"lora_r": {"choice": [4, 8]}}}
    )
    space = Space.parse(settings.search.search_space or {}, settings)
    with pytest.raises(ConfigError, match=r"--warm_start .*search\.yaml belongs to another user"):
        read_earlier_trials(settings, space, "of the rows")
    with pytest.raises(ConfigError, match=r"no finished search is there \(trials.parquet is missing\)"):
        read_earlier_trials(settings.replace(trust_folder=True), space, "of the rows")
    give_away(search)
    with pytest.raises(SystemExit) as ended:
        ui([str(search)])
    assert ended.value.code == 2
    assert "belongs to another user" in capsys.readouterr().err


def test_trust_is_given_on_each_command_line_and_not_kept() -> None:
    assert "trust_folder" not in settings_yaml(Settings.from_flags({"trust_folder": True}))
