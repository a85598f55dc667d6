"""An adapter's folder comes from anybody: it grants itself no rights."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from vlmtune.config.flag_table import flags
from vlmtune.config.limits import UNSUPPORTED
from vlmtune.config.settings import Settings
from vlmtune.errors import ModelError
from vlmtune.evaluation.adapter import TrainedAdapter, adapter_settings, check_adapter_fits
from vlmtune.evaluation.adapter_config import PLACES, RIGHTS, allowed_settings

HOSTILE = {
    "model_name_or_path": "owner/base",
    "trust_remote_code": True,
    "overwrite": True,
    "allow_remote_images": True,
    "allow_outside_paths": True,
    "cache_dir": "/elsewhere",
    "storage_path": "s3://elsewhere/state",
    "image_root": "s3://elsewhere/?endpoint_override=169.254.169.254",
    "attn_implementation": "elsewhere/kernel",
    "lora_r": 4,
}


def test_rights_and_places_are_named_and_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_flags(HOSTILE)
    logging.getLogger("vlmtune").addHandler(caplog.handler)
    try:
        kept = allowed_settings(settings, {"overwrite": False}, "DIR/config.yaml")
    finally:
        logging.getLogger("vlmtune").removeHandler(caplog.handler)
    untouched = {"model_name_or_path": "owner/base", "lora_r": 4}
    assert kept.to_flags() == untouched
    (line,) = caplog.messages
    named = set(HOSTILE) - set(untouched) - {"overwrite"}
    assert all(name in line for name in named) and "overwrite" not in line


def test_every_option_that_grants_a_right_or_names_a_place_is_in_the_list() -> None:
    """A new option of this kind must not come in through an adapter by being forgotten."""
    named = {
        name
        for name in flags()
        if name.startswith(("allow_", "trust_", "overwrite")) or name.endswith(("_dir", "storage_path"))
    }
    assert named - set(UNSUPPORTED) <= {*RIGHTS, *PLACES}


def test_what_the_command_line_gives_counts(tmp_path: Path) -> None:
    settings = Settings.from_flags({"data_path": "s3://mine/a.jsonl", "eval_data_path": "s3://mine/b.jsonl"})
    assert allowed_settings(settings, {"data_path": "s3://mine/a.jsonl"}, "") == settings
    assert allowed_settings(settings, {}, "").to_flags() == {}
    assert allowed_settings(settings, {"data_path": "s3://other/a.jsonl"}, "").to_flags() == {}


@pytest.fixture
def hostile(tmp_path: Path, models: Path) -> tuple[Path, Path]:
    """An adapter whose base brings Python code along, and the file that this code would write."""
    proof = tmp_path / "ran"
    base = tmp_path / "base"
    shutil.copytree(models / "llava", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(
            {
                **config,
                "model_type": "own_llava",
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"},
            }
        )
    )
    (base / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\nraise ValueError('it ran')\n")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    Settings.from_flags({"model_name_or_path": str(base), "trust_remote_code": True}).save(
        folder / "config.yaml"
    )
    return folder, proof


def test_the_bases_python_does_not_run(hostile: tuple[Path, Path]) -> None:
    folder, proof = hostile
    with pytest.raises(ModelError, match="pass --trust_remote_code if you trust it"):
        check_adapter_fits(adapter_settings(str(folder), {}), str(folder))
    with pytest.raises(ModelError, match="pass --trust_remote_code if you trust it"):
        TrainedAdapter(str(folder)).load("cpu")
    assert not proof.exists()
    with pytest.raises(ModelError, match="it ran"):
        check_adapter_fits(adapter_settings(str(folder), {"trust_remote_code": True}), str(folder))
    assert proof.exists()


def test_an_adapter_names_no_module_to_import(hostile: tuple[Path, Path]) -> None:
    folder, _ = hostile
    text = '{"peft_type": "LORA", "megatron_config": {}, "megatron_core": "antigravity"}'
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="has a megatron_config"):
        adapter_settings(str(folder), {})
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is damaged"):
        adapter_settings(str(folder), {})
