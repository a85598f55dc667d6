"""What a run asks of a GPU: the sizes of its model and of its longest rows, for `model.memory`."""

from typing import Any

import numpy as np

from vlmtune.config.settings import Settings
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import ModelError
from vlmtune.model.capture import LENGTH_MULTIPLE
from vlmtune.model.lora import target_modules
from vlmtune.model.memory import Load, Plan, Shapes, estimate, shapes, size_text
from vlmtune.model_ref import outline


def memory_of(
    settings: Settings, store: Store, kept: np.ndarray, *, multiple: int = 1
) -> tuple[Shapes, Load]:
    """The model's sizes with the adapters of the settings, and what a step of its longest training rows asks
    for.

    Args:
        kept: the training rows that are trained on.
        multiple: batches are padded to a multiple of this many tokens.
    """
    model = settings.model
    config = model.ref.config()
    empty = outline(config, trust_remote_code=model.trust_remote_code)
    rows = store.rows_of(TRAIN)[kept]
    longest = int(store.column("tokens")[rows].max())
    if (limit := settings.training.max_length) is not None:
        longest = min(longest, limit)
    crossed, seen = vision_tokens(config, int(store.column("image_tokens")[rows].max()))
    load = Load(
        quantization=model.base_quantization,
        batch=settings.training.per_device_train_batch_size,
        length=-(-longest // multiple) * multiple,
        labelled=int(min(store.column("answer_tokens")[rows].max(), longest)),
        image_tokens=seen if crossed else 0,
        vision_tokens=seen,
        rank=settings.lora.r,
        dropout=settings.lora.dropout > 0,
        compute_bytes=4 if model.dtype == "float32" else 2,
    )
    return shapes(
        empty, target_modules(empty, settings.lora.target_modules, lora_vision=settings.lora.vision)
    ), load


def recordable(settings: Settings, *, packed: bool = False) -> bool:
    """Whether a GPU can record steps of these settings as CUDA graphs: see `training.setup.adapted_model`."""
    model = settings.model
    autocast = (
        model.dtype == "float32"
        and not packed
        and (settings.training.bf16 is not False or bool(settings.training.fp16))
    )
    plain = not (settings.lora.use_dora or settings.lora.modules_to_save or autocast)
    return (
        plain and not settings.training.activation_offloading and settings.training.cuda_graphs is not False
    )


def gpu_memory(settings: Settings, store: Store) -> str:
    """What a step takes on a GPU, at its fastest and at its smallest, in one line; empty where the model is
    not one to adapt."""
    try:
        model, load = memory_of(
            settings,
            store,
            fitting_rows(store, settings.training.max_length, "skip"),
            multiple=LENGTH_MULTIPLE,
        )
    except ModelError:  # the preflight needs the processor alone; training says what is wrong with the model
        return ""
    quantized = load.quantization in ("nf4", "int8")
    plan = Plan(
        resident=quantized,
        checkpointing=False,
        micro_batch=load.batch,
        compiled=True,
        graphs=recordable(settings),
    )
    fast = estimate(model, load, plan)
    small = estimate(model, load, Plan(resident=False, checkpointing=True, micro_batch=1, compiled=True))
    return f"about {size_text(fast.reserved)} of a GPU at the fastest, {size_text(small.total)} at the least; batch size {load.batch}"


def vision_tokens(config: Any, image_tokens: int) -> tuple[bool, int]:
    """Whether cross-attention reads the images, and how many tokens the vision tower makes of those of a row
    with `image_tokens`."""
    if not getattr(config.get_text_config(), "cross_attention_layers", None):
        return False, image_tokens * getattr(
            getattr(config, "vision_config", None), "spatial_merge_size", 1
        ) ** 2
    vision = config.vision_config  # an image is one token of the row
    return True, image_tokens * vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
