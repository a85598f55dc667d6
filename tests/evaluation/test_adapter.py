"""Settings out of an adapter's folder, and options over them."""

import json
from pathlib import Path

import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, ModelError
from vlmtune.evaluation.adapter import adapter_settings, uses_other_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path


def test_config_yaml_tells_base_and_data_and_options_stand_over_it(folder: Path) -> None:
    data = {"data_path": str(folder / "mall"), "group_by": "camera", "eval_fraction": 0.2}
    Settings.from_flags({"model_name_or_path": "owner/other", "quantization": "nf4", **data}).save(
        folder / "config.yaml"
    )
    settings = adapter_settings(str(folder), {"quantization": "none", "use_cpu": "true"})
    assert (settings.model.base_model, settings.model.base_quantization, settings.run.use_cpu) == (
        "owner/other",
        "none",
        True,
    )
    assert settings.data.group_by == "camera"
    same, others = (
        {"data_path": str(folder / "mall" / ".." / "mall")},
        {"data_path": "others.jsonl", "image_root": "photos"},
    )
    assert not uses_other_data(str(folder), same["data_path"])
    assert not uses_other_data(str(folder), None)
    assert uses_other_data(str(folder), others["data_path"])
    assert adapter_settings(str(folder), same).data.group_by == "camera"
    changed = adapter_settings(str(folder), others).data
    assert (changed.group_by, changed.image_root, changed.eval_fraction) == (None, "photos", 0.2)


def test_a_plain_peft_folder_names_its_base(folder: Path) -> None:
    assert adapter_settings(str(folder), {}).model.base_model == "owner/base"
    assert (
        adapter_settings(str(folder), {"model_name_or_path": "owner/moved"}).model.base_model == "owner/moved"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="names no base model; give it with --model_name_or_path"):
        adapter_settings(str(folder), {})


def test_folders_that_are_no_adapter_and_wrong_values(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--quantization: 'nf5' is not one of none, nf4, int8, fp8"):
        adapter_settings(str(folder), {"quantization": "nf5"})
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="holds an adapter of type IA3, not LORA"):
        adapter_settings(str(folder), {})
