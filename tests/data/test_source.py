"""The scan of the data, and the key of its prepared store."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.data import source as source_module
from vlmtune.data.cache import prepare_store
from vlmtune.data.scan import scan
from vlmtune.data.source import DataSource, fingerprint
from vlmtune.errors import ConfigError
from vlmtune.model_ref import ModelRef


def write_rows(path: Path, first: int, number: int) -> str:
    rows = [
        {"instruction": f"What is {index}?", "output": str(index)} for index in range(first, first + number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path, models: Path) -> DataSource:
    return DataSource(
        write_rows(tmp_path / "train.jsonl", 0, 8),
        ModelRef(str(models / "llava")),
        eval_data_path=write_rows(tmp_path / "eval.jsonl", 100, 3),
        test_fraction=0.0,
    )


def test_each_file_is_scanned_once(
    source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan reads JSONL files whole, to count their lines."""
    scanned: list[str] = []

    def counting_scan(data_path: str, **options: Any) -> Any:
        scanned.append(data_path)
        return scan(data_path, **options)

    monkeypatch.setattr(source_module, "scan", counting_scan)
    connect()
    store = prepare_store(source, str(tmp_path / "cache"))
    ray.shutdown()
    assert scanned == [source.data_path, source.eval_data_path]
    assert (len(store.rows_of("train")), len(store.rows_of("eval"))) == (8, 3)


def test_training_fragments_come_first(source: DataSource) -> None:
    scanned = source.scan()
    assert [fragment.shown_path for fragment in scanned.fragments] == [
        source.data_path,
        source.eval_data_path,
    ]
    assert scanned.first_evaluation_fragment == 1
    assert replace(source, eval_data_path=None).scan().first_evaluation_fragment is None


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"on_bad_row": "skip"}, True),
        ({"seed": 1}, False),
        ({"test_fraction": 0.1}, False),
        ({"encoded": False}, False),
        ({"allow_outside_paths": True}, False),
    ],
)
def test_the_key_changes_with_what_changes_rows(
    source: DataSource, change: dict[str, Any], same: bool
) -> None:
    processor = source.model.processor()
    fragments = source.scan().fragments
    key = fingerprint(source, fragments, processor)
    assert len(key) == 24
    assert (fingerprint(replace(source, **change), fragments, processor) == key) == same


def test_the_key_of_a_model_is_its_processors(source: DataSource, tmp_path: Path) -> None:
    processor, fragments = source.model.processor(), source.scan().fragments
    copy = shutil.copytree(source.model.name, tmp_path / "a copy")
    other = replace(source, model=replace(source.model, name=str(copy), revision="v2"))
    assert fingerprint(other, fragments, processor) == fingerprint(source, fragments, processor)
    processor.chat_template = "{{ messages }}"
    assert fingerprint(other, fragments, processor) != fingerprint(
        source, fragments, source.model.processor()
    )


def test_settings_without_data(models: Path) -> None:
    with pytest.raises(ConfigError, match="--data_path is missing"):
        DataSource.from_settings(Settings.from_flags({"model_name_or_path": str(models / "llava")}))
