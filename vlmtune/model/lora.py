"""Put LoRA on a frozen vision-language model through PEFT, keep its weights in float32, save and load it.

The language model is what the model class itself calls its decoder; everything else (vision tower,
projector) counts as vision.
"""

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

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = "all-linear"
ATTENTION = re.compile(r"(^|[._])(attn|attention)\.")  # in the full name of a layer of an attention module
ADAPTER = "default"  # PEFT's own name for an adapter without a name


def target_modules(model: PreTrainedModel, names: list[str] | str | None, *, lora_vision: bool) -> list[str]:
    """The full names of the linear layers that get an adapter, in the model's order.

    The output head is never among them.

    Args:
        names: a list of bare names (`q_proj`, `self_attn.q_proj`) or full names; one such name as a string;
            `all-linear`; None for `DEFAULT_TARGETS`, or for all linear layers of the attention where a
            decoder names those otherwise; or a regular expression that a full name must match as a whole, as
            in PEFT.
        lora_vision: whether names reach the vision tower and projector too, not the language model alone.

    Raises:
        ModelError: a name or the pattern matches no linear layer, the pattern is not a regular expression,
            or it reaches vision layers without `lora_vision`.
    """
    linears = linear_names(model)
    prefix = language_prefix(model)
    allowed = linears if lora_vision else [name for name in linears if name.startswith(prefix)]
    if names == ALL_LINEAR:
        return allowed
    if isinstance(names, str) and not re.fullmatch(r"[\w.]+", names):
        return _matching_pattern(names, linears, allowed)
    if not names or list(names) == list(DEFAULT_TARGETS):
        return _default_targets(model, linears, allowed)
    bare = [names] if isinstance(names, str) else list(names)
    for target in bare:
        if not any(_ends_with(name, target) for name in allowed):
            in_vision = any(_ends_with(name, target) for name in linears)
            if in_vision:
                problem = f"{target!r} is found in the vision tower only: add --lora_vision"
            else:
                problem = f"no linear layer is called {target!r}; there are {_leaf_names(allowed)}"
            raise ModelError(f"lora_target_modules: {problem}")
    return [name for name in allowed if any(_ends_with(name, target) for target in bare)]


def _default_targets(model: PreTrainedModel, linears: list[str], allowed: list[str]) -> list[str]:
    """The attention's projections: by their usual names, or by their place where one of those is missing."""
    decoder = [name for name in linears if name.startswith(language_prefix(model))]
    if not all(any(_ends_with(name, target) for name in decoder) for target in DEFAULT_TARGETS):
        attention = [name for name in allowed if ATTENTION.search(name)]
        if not attention:
            raise ModelError(
                "lora_target_modules: no linear layer of the decoder is part of an attention; "
                f"name some of {_leaf_names(allowed)}"
            )
        return attention
    return [name for name in allowed if any(_ends_with(name, target) for target in DEFAULT_TARGETS)]


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

    The names are written as short as they can be (bare names, or one pattern below the language model), so
    that `adapter_config.json` stays readable.

    Args:
        target_modules: full names, as the function of that name gives them.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only multiplies with it
        lora_dropout=dropout,
        target_modules=_shortest(model, list(target_modules)),
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=modules_to_save,
        task_type="CAUSAL_LM",
    )


def attach(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """The model with new adapters in float32.

    Only they and `modules_to_save` require gradients. A of each layer is `initial_a` and B is zero: the same
    on every device. torch's random state stays as it was.
    """
    import torch
    from peft import get_peft_model

    devices = [model.device] if model.device.type == "cuda" else []
    adapters = plain_library_errors(model.name_or_path, "PEFT's adapter on these target modules")
    with torch.random.fork_rng(devices=devices), adapters:
        peft_model: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.default\.weight", name)
            if match:
                parameter.copy_(initial_a(match[1], *parameter.shape, seed=seed))
    to_fp32(peft_model)
    return peft_model  # type: ignore[no-any-return]


def initial_a(module_name: str, rank: int, in_features: int, *, seed: int) -> Tensor:
    """The first value of A, float32 [rank, in_features] on the CPU.

    It has PEFT's distribution, uniform within 1 / sqrt(in_features), and depends on the layer's name and the
    seed alone, not on which other layers have adapters.
    """
    import torch

    # The seed is a hash of 32 bits, because torch's CPU generator ignores the higher ones.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module_name}".encode()))
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def to_fp32(model: nn.Module) -> None:
    """Cast the trainable parameters to float32 in place; digits that they have lost stay lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def keep_adapter_in_fp32(model: nn.Module) -> Iterator[None]:
    """Put back the float32 values of the trained parameters at the end of the block, bit for bit.

    For the block in which TRL's SFTTrainer is made, which casts adapters on a quantised base to bfloat16.
    Needs one copy of the trained parameters while the block runs.
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
    """Write `adapter_config.json`, `adapter_model.safetensors` and PEFT's model card, as PEFT reads them."""
    # "auto" would ask the Hub for the base's vocabulary size. Trained embeddings are in modules_to_save.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: str | Path, *, trainable: bool = False, name: str = ADAPTER
) -> PeftModel:
    """The base with the adapter of a PEFT folder in float32, in evaluation mode.

    The base is changed in place, also if loading fails half-way.

    Args:
        base: one that has an adapter already gets a further one.
        trainable: in training mode, with parameters that require gradients.
        name: of the adapter in the model.

    Raises:
        ModelError: the folder holds no LoRA adapter, a damaged one, or one that was made for another base.
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
        # Without its name, or PEFT warns of a base that was moved.
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


def linear_names(model: PreTrainedModel) -> list[str]:
    """The full names of all linear layers but the output head, in the model's order."""
    from torch import nn

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def language_prefix(model: PreTrainedModel) -> str:
    """What the names of the language model's modules begin with, for example `model.language_model.`.

    Raises:
        ModelError: the model class does not say which of its parts is the language model.
    """
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and name:
            return f"{name}."
    raise ModelError(
        f"{model.name_or_path}: {type(model).__name__} does not tell its language model from its vision tower"
    )


def _matching_pattern(pattern: str, linears: list[str], allowed: list[str]) -> list[str]:
    try:
        matching = [name for name in linears if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ModelError(
            f"lora_target_modules: {pattern!r} is neither a layer's name nor a regular expression: {error}"
        ) from error
    if not matching:
        raise ModelError(
            f"lora_target_modules: {pattern!r} matches no linear layer; a pattern must match a whole name "
            f"such as {allowed[0]} (there are {_leaf_names(allowed)})"
        )
    outside = [name for name in matching if name not in set(allowed)]
    if outside:
        raise ModelError(
            f"lora_target_modules: {pattern!r} reaches the vision tower ({outside[0]}): add --lora_vision, "
            f"or begin the pattern with the language model's name as in {allowed[0]}"
        )
    return matching


def _ends_with(name: str, target: str) -> bool:
    """PEFT's rule for a list of names."""
    return name == target or name.endswith(f".{target}")


def _leaf_names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _shortest(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """Exactly `names` in PEFT's shortest form: bare names, a pattern below the decoder, or full names."""
    modules = [name for name, _ in model.named_modules()]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    if {name for name in modules if any(_ends_with(name, leaf) for leaf in leaves)} == set(names):
        return leaves
    pattern = rf"{re.escape(language_prefix(model))}.*\.({'|'.join(leaves)})"
    if {name for name in modules if re.fullmatch(pattern, name)} == set(names):
        return pattern
    return names


def check_adapter_folder(folder: Path) -> None:
    """Raises ModelError for a folder without a complete LoRA adapter."""
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
    """Turns what PEFT, torch and safetensors raise about an adapter's files into a `ModelError`."""
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
