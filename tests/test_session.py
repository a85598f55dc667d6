"""Opening runs: what is refused before anything is computed, and where rows are cached."""

from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.session import cache_folder, new_output_folder, with_absolute_paths


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
