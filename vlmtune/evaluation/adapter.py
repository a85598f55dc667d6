"""The folder of a trained adapter: its settings and files, whether it fits the base model, and loading it."""

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.evaluation.adapter_config import allowed_settings
from vlmtune.model.base import check_model, load_base_for
from vlmtune.model.fast import lean_lora
from vlmtune.model.lora import check_adapter_folder, load_adapter
from vlmtune.shown_text import redacted
from vlmtune.storage import absolute, exists, filesystem, read_text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # what PEFT reads
AdapterFiles = dict[str, bytes]  # content of the ADAPTER_FILES of one adapter, by file name


@dataclass(frozen=True)
class TrainedAdapter:
    """A finished adapter.

    Attributes:
        folder: absolute path or URI of its folder, which plain `PeftModel.from_pretrained` loads too.
        trust_remote_code: whether to run the base's own Python code. The folder itself cannot allow it.
    """

    folder: str
    trust_remote_code: bool = False

    def settings(self) -> Settings:
        """The settings with which the adapter was trained.

        Raises:
            ConfigError: its config.yaml cannot be read.
        """
        file = f"{self.folder}/config.yaml"
        values = yaml12.load_options(read_text(file))
        if values is None:
            raise ConfigError(f"{file}: must hold options by name")
        given = {"trust_remote_code": self.trust_remote_code}
        return allowed_settings(Settings.from_flags(values), given, file).replace(**given)

    def load(self, device: Any = None) -> tuple[PeftModel, Any]:
        """Load the base model with this adapter, for inference.

        The base gets the quantization and dtype of the training.

        Args:
            device: a torch device or its name; by default the GPU if there is one.

        Returns:
            The PEFT model in evaluation mode, and the processor (tokenizer and image processor).

        Raises:
            ModelError: the base or the adapter cannot be loaded, or they do not fit.
        """
        import torch

        settings = self.settings()
        on_gpu = torch.cuda.is_available() and not settings.run.use_cpu
        device = torch.device(device if device is not None else "cuda" if on_gpu else "cpu")
        with adapter_folder(read_adapter_files(self.folder)) as folder:
            model = load_adapter(load_base_for(settings, device), folder)
        return model.eval(), settings.model.ref.processor()


def adapter_settings(folder: str, overrides: Mapping[str, Any]) -> Settings:
    """The settings with which an adapter was trained, changed by `overrides` (values by flag name).

    The folder may come from anybody, so settings that grant rights come from `overrides` alone, see
    `allowed_settings`. A plain PEFT folder has no config.yaml; its base is the one that adapter_config.json
    names.

    Raises:
        ModelError: the folder holds no LoRA adapter.
        ConfigError: its config.yaml or an override is wrong, or no base is named.
    """
    settings = allowed_settings(_training_settings(folder), overrides, f"{folder}/config.yaml")
    if uses_other_data(folder, overrides.get("data_path")):  # other data has other folders and columns
        settings = settings.replace(
            eval_data_path=None,
            image_root=None,
            group_by=None,
            columns=None,
            data_weights=None,
            question=None,
            answer_column=None,
        )
    try:
        settings = settings.replace(**overrides)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    if settings.model.model_name_or_path is None:
        raise ConfigError(f"{folder}: names no base model; give it with --model_name_or_path")
    return settings


def uses_other_data(folder: str, data_path: str | list[str] | None) -> bool:
    """Whether `data_path` names other data than the adapter was trained on. None names no data."""
    if data_path is None:
        return False
    paths = [data_path] if isinstance(data_path, str) else data_path
    trained_on = _training_settings(folder).data.paths
    return [redacted(absolute(path)) for path in paths] != [redacted(absolute(path)) for path in trained_on]


def _training_settings(folder: str) -> Settings:
    check_adapter_folder(Path(folder))
    file = Path(folder) / "config.yaml"
    if file.is_file():
        return Settings.load(file)
    base = json.loads((Path(folder) / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    return Settings.from_flags({"model_name_or_path": base} if base else {})


def check_adapter_fits(settings: Settings, folder: str) -> None:
    """Check that the base can be loaded and that the adapter fits it, without reading the base's weights.

    Raises:
        ModelError: the base cannot be loaded, or names, shapes or ranks do not match.
    """
    check_model(settings.model.ref)
    model = settings.model.ref.meta_model()
    with warnings.catch_warnings():
        # The weights stay on the meta device: only their shapes are compared.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        load_adapter(model, folder)


def read_adapter_files(folder: str) -> AdapterFiles:
    """Read the files that PEFT needs from an adapter's folder or URI. A missing file is left out."""
    files, inner = filesystem(folder)
    contents = {}
    for name in ADAPTER_FILES:
        if exists(f"{folder}/{name}"):
            with files.open_input_stream(f"{inner}/{name}") as stream:
                contents[name] = bytes(stream.read())
    return contents


@contextmanager
def adapter_folder(files: AdapterFiles) -> Iterator[str]:
    """A temporary local folder with an adapter's files, inside the block."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield folder


def load_model(settings: Settings, adapters: Mapping[str, AdapterFiles], device: Any) -> Any:
    """Load the base on `device` with any number of named adapters; `answering_as` activates one of them."""
    model: Any = load_base_for(settings, device)
    for name, files in adapters.items():
        with adapter_folder(files) as folder:
            model = load_adapter(model, folder, name=name)
    if adapters:
        lean_lora(model)
    return model.eval()


@contextmanager
def answering_as(model: Any, name: str) -> Iterator[None]:
    """Activate the adapter called `name` inside the block; without such an adapter, the base alone."""
    has_adapters = isinstance(model, PeftModel)
    has_this_one = has_adapters and name in model.peft_config
    if has_this_one:
        model.set_adapter(name, inference_mode=True)
    with model.disable_adapter() if has_adapters and not has_this_one else nullcontext():
        yield
