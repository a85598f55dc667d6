"""Which names are paths, before anything is looked up."""

from pathlib import Path

import pytest

from vlmtune.cli.early_checks import check_paths, looks_local
from vlmtune.config.settings import Settings
from vlmtune.errors import UserError


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("/data/x", True),
        ("./x", True),
        ("rows.jsonl", True),
        ("a/b/c", True),
        ("owner/name", False),
        ("imdb", False),
        ("llava-hf/llava-1.5-7b-hf", False),
    ],
)
def test_a_name_of_the_hub_is_no_path(name: str, local: bool) -> None:
    assert looks_local(name) == local


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: no such file or folder"):
        check_paths(Settings.from_flags({"data_path": f"{tmp_path}/no.jsonl"}))
    with pytest.raises(UserError, match="is not there: no such folder"):
        check_paths(Settings.from_flags({"data_path": "org/set", "model_name_or_path": f"{tmp_path}/no"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="demo --files_only"):
        check_paths(Settings.from_flags({"data_path": ".", "model_name_or_path": "demo/llava"}))
    check_paths(Settings.from_flags({"data_path": str(tmp_path), "model_name_or_path": "org/model"}))
    check_paths(Settings.from_flags({"data_path": "s3://bucket/rows.jsonl"}))
