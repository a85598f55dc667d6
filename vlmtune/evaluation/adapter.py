"""An adapter's folder: the settings that it was trained with, whether it fits its base, and the files that
PEFT needs of it."""

import json
import warnings
from pathlib import Path

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.model.base import check_model
from vlmtune.model.lora import check_adapter_folder, load_adapter
from vlmtune.storage import absolute

WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def adapter_settings(folder: str, given: dict[str, str]) -> Settings:
    """The settings that an adapter was trained with, and over them those that are given.

    A plain PEFT folder, without config.yaml, names its base in adapter_config.json.

    Raises:
        ModelError: the folder holds no LoRA adapter.
        ConfigError: its config.yaml or a given value is wrong, or no base is named.
    """
    settings = _trained_with(folder)
    if other_data(folder, given):  # it has its own folders and columns
        settings = settings.replace(eval_data_path=None, image_root=None, group_by=None)
    try:
        settings = settings.replace(**given)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    if settings.model.model_name_or_path is None:
        raise ConfigError(f"{folder}: names no base model; give it with --model_name_or_path")
    return settings


def other_data(folder: str, given: dict[str, str]) -> bool:
    """Whether data is given that is not what the adapter was trained on."""
    trained = _trained_with(folder).data.data_path
    return "data_path" in given and (trained is None or absolute(given["data_path"]) != absolute(trained))


def _trained_with(folder: str) -> Settings:
    check_adapter_folder(Path(folder))
    file = Path(folder) / "config.yaml"
    if file.is_file():
        return Settings.load(file)
    base = json.loads((Path(folder) / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    return Settings.from_flags({"model_name_or_path": base} if base else {})


def check_fit(settings: Settings, folder: str) -> None:
    """Raises ModelError where the base cannot be loaded or the adapter is not for it: names, shapes, ranks.
    Reads no base weights."""
    check_model(settings.model.ref)
    model = settings.model.ref.outline()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*copying from a non-meta parameter"
        )  # the shapes are what is looked at
        load_adapter(model, folder)


def adapter_files(folder: str) -> dict[str, bytes]:
    """What PEFT needs of an adapter's folder."""
    check_adapter_folder(Path(folder))
    return {name: (Path(folder) / name).read_bytes() for name in WEIGHTS if (Path(folder) / name).is_file()}
