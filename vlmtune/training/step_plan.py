"""Plan how a training step runs, by the memory that it needs and that the GPU has."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.model.capture import LENGTH_MULTIPLE
from vlmtune.model.choose_plan import WORTH_COMPILING, PlanOptions, choose_plan, plan_text, training_seconds
from vlmtune.model.frozen import has_fp8_units
from vlmtune.model.lora_targets import target_modules
from vlmtune.model.memory import GB, StepLoad, StepPlan, estimate_memory
from vlmtune.model.shapes import ModelShapes, model_shapes
from vlmtune.model_ref import model_on_meta

NO_FP8_UNITS = (
    "fp8: this device has no units for it, so the rounded values are multiplied in the type that the base "
    "computes in"
)


def plan_step(
    settings: Settings,
    store: Store,
    usable_rows: np.ndarray,
    world_size: int,
    note: Callable[[str], None],
    *,
    runs: int = 1,
    sizes: tuple[int, ...] = (),
    **load_changes: Any,
) -> StepPlan:
    """Choose the plan of a step. On a GPU, the plan depends on its memory, and is noted in a console line.

    Args:
        usable_rows: indices, among the rows of the training split, of those that are trained on.
        world_size: the number of workers that share the rows.
        note: called with each line for the console.
        runs: the number of such runs, because compiling may pay only for several.
        sizes: the micro-batch sizes to choose from, see `PlanOptions`.
        load_changes: fields of `StepLoad` that differ from those of the settings.

    Raises:
        DoesNotFitError: not even one row at a time would fit.
    """
    training = settings.training
    batch, micro_batch_size = training.per_device_train_batch_size, training.micro_batch_size
    dequantized = {"auto": None, "quantized": False, "dequantized": True}[settings.model.base_in_memory]
    gpu = uses_gpu(settings)
    if settings.model.base_quantization == "fp8" and not (gpu and has_fp8_units(torch.device("cuda"))):
        note(NO_FP8_UNITS)
    if not gpu:
        checkpointing, compiled = bool(training.gradient_checkpointing), bool(training.torch_compile)
        return StepPlan(bool(dequantized), checkpointing, micro_batch_size or batch, compiled)
    model, load = shapes_and_load(settings, store, usable_rows, pad_to_multiple_of=length_multiple(settings))
    load = replace(load, **load_changes)
    compile_layers = training.torch_compile
    if compile_layers is None:
        steps = training.max_steps
        rows = steps * batch if steps > 0 else training.num_train_epochs * len(usable_rows) / world_size
        compile_layers = training_seconds(model, runs * rows * load.length) > WORTH_COMPILING
    free = torch.cuda.mem_get_info()[0]
    options = PlanOptions(
        dequantized=dequantized,
        checkpointing=training.gradient_checkpointing,
        micro_batch_size=micro_batch_size,
        sizes=sizes,
        compiled=compile_layers,
        offload=training.activation_offloading,
        can_capture=can_capture(settings, packed=load.packed_adapters > 0),
    )
    plan = choose_plan(model, load, free, options)
    needed = estimate_memory(model, load, plan).text()
    note(console_line("Memory", f"about {needed} of {free / GB:.0f} GB: {plan_text(plan, load)}"))
    return plan


def shapes_and_load(
    settings: Settings, store: Store, usable_rows: np.ndarray, *, pad_to_multiple_of: int = 1
) -> tuple[ModelShapes, StepLoad]:
    """The sizes of the model with its adapter, and the load of a step with the longest rows.

    Args:
        usable_rows: indices, among the rows of the training split, of those that are trained on.
        pad_to_multiple_of: the length of a padded batch in tokens is a multiple of this.
    """
    model, lora = settings.model, settings.lora
    config = model.ref.config()
    meta_model = model_on_meta(config, trust_remote_code=model.trust_remote_code)
    rows = store.rows_of(TRAIN)[usable_rows]
    longest = int(store.column("tokens")[rows].max())
    if (limit := settings.training.max_length) is not None:
        longest = min(longest, limit)
    has_cross_attention, vision_token_count = vision_tokens(
        config, int(store.column("image_tokens")[rows].max())
    )
    load = StepLoad(
        quantization=model.base_quantization,
        batch=settings.training.per_device_train_batch_size,
        length=-(-longest // pad_to_multiple_of) * pad_to_multiple_of,
        labelled_tokens=int(min(store.column("answer_tokens")[rows].max(), longest)),
        cross_attention_tokens=vision_token_count if has_cross_attention else 0,
        vision_tokens=vision_token_count,
        lora_rank=lora.r,
        dropout=lora.dropout > 0,
        compute_bytes=4 if model.dtype == "float32" else 2,
    )
    targets = target_modules(meta_model, lora.target_modules, lora_vision=lora.vision)
    return model_shapes(meta_model, targets), load


def vision_tokens(config: Any, image_tokens: int) -> tuple[bool, int]:
    """Whether the decoder reads images by cross-attention, and a row's number of tokens in the vision tower.

    Args:
        image_tokens: the number of image tokens in the row.
    """
    if not getattr(config.get_text_config(), "cross_attention_layers", None):
        merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        return False, image_tokens * merged**2
    vision = config.vision_config  # an image is one token of the row
    return True, image_tokens * vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)


def can_capture(settings: Settings, *, packed: bool = False) -> bool:
    """Whether steps with these settings can be captured as CUDA graphs, see `AcceleratedStep.for_adapter`."""
    return why_not_captured(settings, packed=packed) is None


def why_not_captured(settings: Settings, *, packed: bool = False) -> str | None:
    """The option because of which steps cannot be captured as CUDA graphs; None if they can."""
    training, lora = settings.training, settings.lora
    mixed = training.bf16 is not False or bool(training.fp16)
    reasons = {
        "use_dora": lora.use_dora,
        "lora_modules_to_save": bool(lora.modules_to_save),
        "dtype float32 with bf16 or fp16": settings.model.dtype == "float32" and not packed and mixed,
        "activation_offloading": training.activation_offloading,
        "cuda_graphs false": training.cuda_graphs is False,
    }
    return next((f"because of --{reason}" for reason, applies in reasons.items() if applies), None)


def length_multiple(settings: Settings) -> int:
    """Batches are padded to a multiple of this many tokens; on a GPU, so that few lengths are captured."""
    return settings.training.pad_to_multiple_of or (LENGTH_MULTIPLE if uses_gpu(settings) else 1)


def uses_gpu(settings: Settings) -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available() and not settings.run.use_cpu
