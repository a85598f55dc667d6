"""`ModelRef`: names a model and loads its config and processor, with plain messages if that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ModelError
from vlmtune.hub import stay_offline_unless_reachable
from vlmtune.image_resolution import PROCESSORS_OWN, ImageResolution
from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory, plain_library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

TOKEN_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class ModelRef:
    """A model on the Hub or in a folder, whether its own Python code may run, and its images' resolution."""

    name: str
    revision: str = "main"
    trust_remote_code: bool = False
    resolution: ImageResolution = PROCESSORS_OWN

    def config(self) -> PreTrainedConfig:
        """The config of a vision-language model. Its weights need not be there.

        Raises:
            ModelError: the config is missing, gated, damaged, or not that of a vision-language model.
        """
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        with plain_model_errors(self):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        remote_classes = getattr(config, "auto_map", None) or {}
        if (
            type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            and "AutoModelForImageTextToText" not in remote_classes
        ):
            raise ModelError(
                f"{self.name} is not a vision-language model (its type is {config.model_type!r}): "
                "give one that AutoModelForImageTextToText loads, for example llava-hf/llava-1.5-7b-hf"
            )
        if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config())):
            raise ModelError(
                f"{self.name} is an encoder-decoder ({config.model_type!r}): its answers are not part of one "
                "text with the question, so it cannot be tuned here"
            )
        return config

    def meta_model(self) -> Any:
        """The model without weights, on the meta device. Costs a second or two, whatever the model's size.

        Raises:
            ModelError: as `config`.
        """
        model = model_on_meta(self.config(), trust_remote_code=self.trust_remote_code)
        model.name_or_path = self.name
        return model

    def processor(self) -> ProcessorMixin:
        """The model's processor: its tokenizer and image processor, at the resolution.

        Raises:
            ModelError: the processor is missing, gated, damaged, or has no image processor.
            ConfigError: it cannot have the resolution.
        """
        from transformers import AutoProcessor, ProcessorMixin

        with plain_model_errors(self):
            auto: Any = AutoProcessor
            processor = auto.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
            raise ModelError(
                f"{self.name}: no vision-language processor there (found {type(processor).__name__}, which "
                "takes no images): give a vision-language model, or copy its processor_config.json and "
                "preprocessor_config.json into the folder"
            )
        if getattr(processor, "tokenizer", None) is None:
            raise ModelError(
                f"{self.name}: its {type(processor).__name__} has no tokenizer, so it takes no text"
            )
        self.resolution.apply(processor, self.name)
        return processor


def model_on_meta(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The model of a config without weights, on the meta device: its modules and shapes."""
    import torch
    from transformers import AutoModelForImageTextToText

    with plain_library_errors(config.name_or_path, "its class without weights"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def plain_model_errors(ref: ModelRef) -> Iterator[None]:
    """Turn exceptions of transformers, huggingface_hub and safetensors about a model into a `ModelError`."""
    from safetensors import SafetensorError

    if not Path(ref.name).exists():
        stay_offline_unless_reachable()
    try:
        yield
    except (*LIBRARY_ERRORS, SafetensorError, UnpicklingError) as error:
        if lacks_memory(error):
            raise
        raise ModelError(_explain(error, ref.name, ref.revision)) from error


def _explain(error: Exception, name: str, revision: str) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from safetensors import SafetensorError

    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return f"{name} is a LoRA adapter, not a base model: give the base that its adapter_config.json names"
    if name.startswith("demo/"):
        return f"{name} is not there: `vlmtune demo --files_only` writes it in seconds"
    if caused_by(GatedRepoError):
        page = f"https://huggingface.co/{name}"
        return (
            f"{name} is gated: accept its licence on {page}, make a token on "
            f"{TOKEN_PAGE}, then `hf auth login`, or set HF_TOKEN"
        )
    if caused_by(RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: see the model's page for its branches, tags and commits"
    if caused_by(RepositoryNotFoundError):
        return (
            f"{name} is neither a folder nor a model on the Hub: check the spelling, or, if it is private, "
            f"make a token on {TOKEN_PAGE} and log in with `hf auth login`"
        )
    if caused_by(HFValidationError):
        return f"{name} is not there: no such folder, and no name of a model on the Hub (OWNER/MODEL)"
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled):
        return (
            f"{name} is neither a folder nor in the local cache, and the Hub cannot be reached: check the "
            "name and the network, unset HF_HUB_OFFLINE if it is set, or download the model first with "
            "`hf download` (if it is gated, accept its licence on "
            f"https://huggingface.co/{name} and log in with `hf auth login`)"
        )
    if caused_by(SafetensorError):
        return f"{name}: a weight file is damaged ({first_line(error)}): copy or download it again"
    if any("torchvision" in str(cause).lower() for cause in causes):
        return _explain_torchvision(name)
    if caused_by(ImportError):
        return f"{name} needs a package that is not installed: {first_line(error)}"
    if caused_by(UnpicklingError):
        return (
            f"{name}: its weights are a pickle that holds more than tensors, which could run code: give the "
            "model as safetensors"
        )
    if caused_by(RecursionError):
        return f"{name} is damaged: a file of it is nested too deep"
    if "trust_remote_code" in str(error):
        return f"{name} brings its own Python code: read it, and pass --trust_remote_code if you trust it"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{name} cannot be loaded: {kind}{first_line(error)}"


def _explain_torchvision(name: str) -> str:
    """The message for a processor that needs torchvision, which is missing or does not fit torch."""
    torch = version("torch").partition("+")[0]
    try:
        found = f"{version('torchvision')} is not made for torch {torch}"
    except PackageNotFoundError:
        found = "is not installed"
    return (
        f"the processor of {name} needs torchvision, which {found}: install the torchvision that belongs to "
        f"torch {torch}, from the index that torch came from (README.md says how)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
