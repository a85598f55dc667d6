"""Find, check, load, quantize and freeze a vision-language base model.

Problems with the model's name, folder, licence or network raise a `ModelError` of one line. If memory runs
out, `torch.OutOfMemoryError` is raised, because a search treats that as an infeasible trial, not as a
mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ModelError
from vlmtune.library_errors import first_line
from vlmtune.model_ref import ModelRef, plain_model_errors

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    from vlmtune.config.options import Dtype, Quantization
    from vlmtune.config.settings import Settings

# In the order in which transformers prefers them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def check_model(ref: ModelRef) -> PreTrainedConfig:
    """Check a model as far as possible without reading its weights; returns its config.

    If the model is a folder, the header of every weight file is read (milliseconds at any size), which finds
    missing and truncated shards.

    Raises:
        ModelError: the model is missing, gated, incomplete, damaged, or not a vision-language model.
    """
    config = ref.config()
    if Path(ref.name).is_dir():
        _check_weight_files(Path(ref.name))
    return config


def load_base(
    ref: ModelRef,
    *,
    quantization: Quantization,
    dtype: Dtype | None,
    device: torch.device,
    nested_quant: bool = True,
    llm_int8: bool = False,
    dequantized: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The frozen base model on `device`: no parameter requires a gradient, and the key-value cache is off.

    Args:
        quantization: nf4 and int8 quantize every linear layer except the output head, also those of the
            vision tower, as transformers does by default. int8 means 8-bit weights with arithmetic in
            `dtype`. With fp8, the language model's linear layers multiply 8-bit floats. See
            `vlmtune.model.frozen`.
        dtype: dtype of the computation, and of embeddings, norms, convolutions and the head. None means
            `default_dtype(device)`, "auto" the dtype that the model was saved in.
        nested_quant: also quantize nf4's scales.
        llm_int8: for int8, use bitsandbytes' LLM.int8, which also quantizes activations to 8 bits.
        dequantized: unpack the weights of nf4 or int8 once, and hold them in `dtype`.

    Raises:
        ModelError: as `check_model`; also if weights are missing, have a wrong shape, or are stored in
            another quantization.
        torch.OutOfMemoryError: the model does not fit on the device.
    """
    from vlmtune.model.frozen import dequantize_layers, make_fp8, prepare_quantized_layers
    from vlmtune.model.mllama import mask_padding_images

    config = check_model(ref)
    resolved = resolve_dtype(dtype, config, device)
    stored = _stored_quantization(ref.name, config, quantization)
    if stored is not None:  # the stored config has the dtype of the computation, which may differ
        config.quantization_config = {
            **stored,
            "bnb_4bit_compute_dtype": str(resolved).removeprefix("torch."),
        }
    new_quantization = (
        bitsandbytes_config(quantization, resolved, nested_quant, unquantized_layers(ref, quantization))
        if stored is None
        else None
    )
    model = _load_checked(ref, config, resolved, device, new_quantization, attn_implementation)
    model.requires_grad_(False)
    if dequantized:
        dequantize_layers(model, resolved)
    elif quantization == "fp8":
        make_fp8(model.get_decoder())
    else:
        prepare_quantized_layers(model, llm_int8=llm_int8)
    mask_padding_images(model)
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    return model


def _load_checked(
    ref: ModelRef,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization_config: BitsAndBytesConfig | None,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """The model of the config on `device`. Raises ModelError if weights are missing or have a wrong shape."""
    import torch
    from transformers import AutoModelForImageTextToText

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with plain_model_errors(ref):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            ref.name,
            config=config,
            revision=ref.revision,
            dtype=dtype,
            device_map={"": str(device)},
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            trust_remote_code=ref.trust_remote_code,
            ignore_mismatched_sizes=True,  # so that `_check_loading` can list them in one line
            output_loading_info=True,
        )
    model, loading_info = loaded
    _check_loading(ref.name, info=loading_info)
    return model  # type: ignore[no-any-return]


def load_base_for(settings: Settings, device: torch.device, *, dequantized: bool = False) -> PreTrainedModel:
    """Call `load_base` with the arguments that the settings have."""
    model = settings.model
    return load_base(
        model.ref,
        quantization=model.base_quantization,
        dtype=model.dtype,
        device=device,
        nested_quant=model.use_bnb_nested_quant,
        llm_int8=model.llm_int8,
        dequantized=dequantized,
        attn_implementation=model.attn_implementation,
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32.

    float16 is never the default. It is faster on older GPUs, but it needs loss scaling, and models that were
    trained in bfloat16 can overflow in it.
    """
    import torch

    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def resolve_dtype(dtype: Dtype | None, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The torch dtype of the setting `dtype`, see `load_base`."""
    import torch

    saved = config.dtype or config.get_text_config().dtype
    if dtype == "auto" and saved is not None:
        return getattr(torch, saved) if isinstance(saved, str) else saved
    if dtype is None or dtype == "auto":
        return default_dtype(device)
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]


def unquantized_layers(ref: ModelRef, quantization: Quantization) -> list[str] | None:
    """Names of the layers that must not be quantized; None if transformers' default list is right."""
    from transformers.quantizers.base import get_keys_to_not_convert

    from vlmtune.model.direct_weights import directly_read_layers

    if quantization not in ("nf4", "int8"):
        return None
    model = ref.meta_model()
    names = directly_read_layers(model)
    return [*get_keys_to_not_convert(model), *names] if names else None


def bitsandbytes_config(
    quantization: Quantization,
    dtype: torch.dtype,
    nested_quant: bool,
    unquantized: list[str] | None = None,
) -> BitsAndBytesConfig | None:
    """The config with which transformers quantizes to nf4 or int8; None for another quantization.

    Args:
        unquantized: names of the layers that are not quantized; None for the output head.
    """
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if quantization == "nf4":
        return make(  # type: ignore[no-any-return]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=nested_quant,
            llm_int8_skip_modules=unquantized,
        )
    if quantization == "int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=unquantized)  # type: ignore[no-any-return]
    return None


def _stored_quantization(name: str, config: PreTrainedConfig, wanted: Quantization) -> dict[str, Any] | None:
    """The quantization config that the weights were saved with; None if they were saved unquantized.

    Quantized weights can only be loaded with this config: transformers ignores another one with a warning.

    Raises:
        ModelError: the weights were saved in another quantization than `wanted`.
    """
    stored: dict[str, Any] | None = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    if stored.get("load_in_8bit"):
        kind = "int8"
    elif stored.get("load_in_4bit"):
        kind = stored.get("bnb_4bit_quant_type", "fp4")
    else:
        kind = str(stored.get("quant_method", "an unknown quantization"))
    if kind != wanted:
        can_load = kind in ("nf4", "int8")
        way_out = f"use --quantization {kind}" if can_load else "give the model that it was made from"
        raise ModelError(
            f"{name} is stored in {kind}, so it cannot be loaded with --quantization {wanted}: {way_out}"
        )
    return stored


def _check_weight_files(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise ModelError(
            f"{folder} has a config.json but no weights ({' or '.join(WEIGHT_FILES[::2])}): copy or download "
            "them again"
        )
    shards = [weights]
    if weights.suffix == ".json":
        try:
            names = set(json.loads(weights.read_bytes())["weight_map"].values())
            shards = [folder / shard for shard in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(
                f"{weights} is not an index of weight shards: copy or download it again"
            ) from None
    for shard in shards:
        if not shard.is_file():
            raise ModelError(
                f"{folder} is incomplete: {shard.name} is missing ({weights.name} names it): copy or "
                "download it again"
            )
        if shard.suffix != ".safetensors":
            continue
        try:
            with safe_open(shard, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(
                f"{shard} is damaged or cut short ({first_line(error)}): copy or download it again"
            ) from error


def _check_loading(name: str, info: dict[str, Any]) -> None:
    """Refuse a model with tensors that are in no file. transformers has filled them with random numbers."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{name} is incomplete: {len(missing)} tensors are in no weight file, for example {missing[0]}"
        )
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"], key=lambda entry: str(entry[0]))[0]
        raise ModelError(
            f"{name} does not fit its own config.json: {key} is {list(stored)} in the weights, "
            f"{list(expected)} by the config"
        )
