"""Attach a LoRA adapter to a frozen model with PEFT, keep it in float32, save it and load it."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ModelError
from vlmtune.library_errors import plain_library_errors
from vlmtune.model.lora_targets import shortest_targets

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ADAPTER = "default"  # PEFT's own name for an adapter without a name


def lora_config(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: list[str] | None = None,
) -> LoraConfig:
    """PEFT's config for adapters on exactly the layers `target_modules`.

    The config has the names in their shortest form (bare names, or one pattern for the language model), so
    that `adapter_config.json` stays readable.

    Args:
        target_modules: full names, as `lora_targets.target_modules` returns them.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only multiplies with it
        lora_dropout=dropout,
        target_modules=shortest_targets(model, list(target_modules)),
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=modules_to_save,
        task_type="CAUSAL_LM",
    )


def attach(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """The model with a new adapter in float32.

    Only the adapter and `modules_to_save` require gradients. Each layer's A is `initial_a` and its B is zero,
    the same on every device. torch's random state is not changed.
    """
    import torch
    from peft import get_peft_model

    devices = [model.device] if model.device.type == "cuda" else []
    readable_errors = plain_library_errors(model.name_or_path, "PEFT's adapter on these target modules")
    with torch.random.fork_rng(devices=devices), readable_errors:
        peft_model: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.default\.weight", name)
            if match:
                parameter.copy_(initial_a(match[1], *parameter.shape, seed=seed))
    to_fp32(peft_model)
    return peft_model  # type: ignore[no-any-return]


def initial_a(module_name: str, rank: int, in_features: int, *, seed: int) -> Tensor:
    """The initial value of a layer's A, float32 [rank, in_features] on the CPU.

    It has PEFT's distribution, uniform within 1 / sqrt(in_features). It depends on the layer's name and the
    seed only, not on which other layers have adapters.
    """
    import torch

    # The seed is a hash of 32 bits, because torch's CPU generator ignores higher bits.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module_name}".encode()))
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def to_fp32(model: nn.Module) -> None:
    """Cast the trainable parameters to float32 in place. Precision that was lost before is not restored."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def keep_adapter_in_fp32(model: nn.Module) -> Iterator[None]:
    """Put back the float32 values of the trained parameters at the end of the block, bit for bit.

    Use it around the construction of TRL's SFTTrainer, which casts adapters on a quantized base to bfloat16.
    It holds a copy of the trained parameters while the block runs.
    """
    import torch

    before = [
        (parameter, parameter.detach().float().clone())
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    yield
    with torch.no_grad():
        for parameter, value in before:
            parameter.data = value.to(parameter.device)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and PEFT's model card."""
    # The default "auto" asks the Hub for the base's vocabulary size. Trained embeddings are in
    # modules_to_save.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: str | Path, *, trainable: bool = False, name: str = ADAPTER
) -> PeftModel:
    """Load the adapter of a PEFT folder into the base, in float32.

    The base is changed in place, also if loading fails.

    Args:
        base: the base model. If it has adapters already, it gets one more, which is not made active.
        trainable: return the model in training mode, with an adapter that requires gradients; otherwise in
            evaluation mode.
        name: the adapter's name in the model.

    Raises:
        ModelError: the folder holds no LoRA adapter, a damaged one, or one for another base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    folder = Path(folder)
    check_adapter_folder(folder)
    misfit = f"{folder} does not fit the base {base.name_or_path}"
    with _adapter_errors(folder, misfit):
        config: Any = PeftConfig.from_pretrained(str(folder))
        weights: Any = load_peft_weights(str(folder), device="cpu")
        config.inference_mode = not trainable
        # The config gets no base name meanwhile, because PEFT would warn about a base that was moved.
        base_name, config.base_model_name_or_path = config.base_model_name_or_path, None
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
        model: Any = base if isinstance(base, PeftModel) else get_peft_model(base, config, adapter_name=name)
        model.peft_config[name].base_model_name_or_path = base_name
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [
        key
        for key in result.missing_keys
        if (".lora_" in key or ".modules_to_save." in key) and name in key.split(".")
    ]
    if missing or result.unexpected_keys:
        example = (missing or result.unexpected_keys)[0]
        if missing:
            problem = "adapter_config.json asks for more tensors than are there"
        else:
            problem = "it has tensors for layers that do not exist"
        raise ModelError(f"{misfit}: {problem}, for example {example}")
    return model.train(trainable)  # type: ignore[no-any-return]


def check_adapter_folder(folder: Path) -> None:
    """Raises ModelError if a folder holds no complete LoRA adapter."""
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise ModelError(f"{folder} is not an adapter: it has no adapter_config.json")
    try:
        config = json.loads(config_file.read_bytes())
        kind, megatron = config["peft_type"], config.get("megatron_config")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{config_file} is damaged: it is not a JSON object with a peft_type") from None
    if kind != "LORA":
        raise ModelError(f"{folder} holds an adapter of type {kind}, not LORA")
    if megatron is not None:  # PEFT would import the Python module that the file names
        raise ModelError(
            f"{config_file} has a megatron_config: adapters of Megatron models are not supported"
        )
    if not any((folder / file).is_file() for file in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ModelError(f"{folder} is incomplete: adapter_model.safetensors is missing")


@contextmanager
def _adapter_errors(folder: Path, misfit: str) -> Iterator[None]:
    """Turn exceptions of PEFT, torch and safetensors about an adapter's files into a `ModelError`."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, UnpicklingError) as error:
        raise ModelError(f"{folder} is damaged: its weight file cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, re.error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "mismatch" in line), lines[0] if lines else error)
        raise ModelError(f"{misfit}: {reason}") from error
