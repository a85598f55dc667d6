"""Opening and resuming runs: what is refused before anything is computed, and where rows are cached."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.session import (
    SEARCH,
    TRAINING,
    RunKind,
    cache_folder,
    interrupted_run,
    new_output_folder,
    with_absolute_paths,
)

KINDS = pytest.mark.parametrize("kind", [TRAINING, SEARCH], ids=lambda kind: kind.noun)


def interrupted(folder: Path, kind: RunKind, **state: Any) -> Path:
    """An output folder as a run that was killed leaves it."""
    file = folder / kind.state_file
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"key": "of the rows", "format": kind.state_format, **state}))
    (folder / kind.settings_file).write_text("lora_r: 4\ndata_path: data.jsonl\n")
    return folder


@KINDS
def test_an_interrupted_run_is_resumed_with_its_own_settings(kind: RunKind, tmp_path: Path) -> None:
    folder, settings = interrupted_run(str(interrupted(tmp_path / "out", kind)), kind)
    assert folder == str(tmp_path / "out")
    assert settings == Settings.from_flags({"lora_r": 4, "data_path": "data.jsonl"})


@KINDS
def test_what_cannot_be_resumed_is_said_in_one_line(kind: RunKind, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"absent: no {kind.noun} is there \({kind.settings_file} is missing\)"
    ):
        interrupted_run(str(tmp_path / "absent"), kind)
    ended = interrupted(tmp_path / "ended", kind)
    (ended / kind.finished_file).write_text("")
    with pytest.raises(ConfigError, match=f"this {kind.noun} has ended, nothing is left to do"):
        interrupted_run(str(ended), kind)
    damaged = interrupted(tmp_path / "damaged", kind)
    (damaged / kind.settings_file).write_text("- no\n- mapping\n")
    with pytest.raises(ConfigError, match=rf"{kind.settings_file} is damaged"):
        interrupted_run(str(damaged), kind)


def test_runs_of_an_older_version_are_resumed_and_its_searches_refused(tmp_path: Path) -> None:
    for kind in (TRAINING, SEARCH):
        (interrupted(tmp_path / kind.noun, kind) / kind.state_file).write_text('{"key": "of the rows"}')
    assert interrupted_run(str(tmp_path / "run"), TRAINING)[0] == str(tmp_path / "run")
    with pytest.raises(ConfigError, match="this search was started by an older vlmtune") as caught:
        interrupted_run(str(tmp_path / "search"), SEARCH)
    assert "\n" not in str(caught.value)


def test_the_output_lies_in_storage_path_where_it_is_relative(tmp_path: Path) -> None:
    def folder(**flags: Any) -> str:
        return new_output_folder(Settings.from_flags(flags))

    shared = str(tmp_path / "shared")
    assert folder(output_dir="out", storage_path=shared) == f"{shared}/out"
    assert folder(output_dir=f"{tmp_path}/out", storage_path=shared) == f"{tmp_path}/out"
    with pytest.raises(ConfigError, match="--num_workers 0 writes to a local folder"):
        folder(output_dir="s3://bucket/out?region=eu-west-1", num_workers="0")


def test_prepared_rows_have_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(Settings()) == f"{tmp_path}/vlmtune/prepared"
    shared = Settings.from_flags({"storage_path": "/shared"})
    assert cache_folder(shared) == "/shared/prepared"
    assert cache_folder(shared.replace(cache_dir="/fast")) == "/fast"


def test_local_paths_become_absolute_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    settings = Settings.from_flags({"data_path": "data.jsonl", "model_name_or_path": "owner/base"})
    absolute = with_absolute_paths(settings)
    assert (absolute.data.data_path, absolute.model.base_model) == (f"{tmp_path}/data.jsonl", "owner/base")
