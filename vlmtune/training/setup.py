"""What has to stand before the first step: the plan that fits the GPU, TRL's arguments, and the base with
its adapter."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.model.base import base_of
from vlmtune.model.capture import LENGTH_MULTIPLE
from vlmtune.model.frozen import has_fp8
from vlmtune.model.lora import attach, lora_config, target_modules
from vlmtune.model.memory import WORTH_COMPILING, Plan, choose, estimate, plan_text, seconds_of
from vlmtune.model.step import AcceleratedStep
from vlmtune.training.needs import memory_of, recordable


def plan_step(
    settings: Settings,
    store: Store,
    kept: np.ndarray,
    world: int,
    note: Callable[[str], None],
    *,
    runs: int = 1,
    **load_of: Any,
) -> Plan:
    """How a step is run, on a GPU by its memory; says so.

    Args:
        runs: how many runs like this one follow: worth compiling for.
        load_of: fields of `Load` that differ from what the settings say.

    Raises:
        DoesNotFitError: not even one row at a time would fit.
    """
    batch, checkpointing = (
        settings.training.per_device_train_batch_size,
        settings.training.gradient_checkpointing,
    )
    held = {"auto": None, "quantized": False, "dequantized": True}[settings.model.base_in_memory]
    compiled, micro_batch = settings.training.torch_compile, settings.training.micro_batch_size
    gpu = torch.cuda.is_available() and not settings.run.use_cpu
    if settings.model.base_quantization == "fp8" and not (gpu and has_fp8(torch.device("cuda"))):
        note(
            "fp8: this device has no units for it, so the rounded values are multiplied in the type that the base computes in"
        )
    if not gpu:
        return Plan(bool(held), bool(checkpointing), micro_batch or batch, bool(compiled))
    model, load = memory_of(settings, store, kept, multiple=length_multiple(settings))
    load = replace(load, **load_of)
    if compiled is None:
        steps = settings.training.max_steps
        rows = steps * batch if steps > 0 else settings.training.num_train_epochs * len(kept) / world
        compiled = seconds_of(model, runs * rows * load.length) > WORTH_COMPILING
    free = torch.cuda.mem_get_info()[0]
    plan = choose(
        model,
        load,
        free,
        resident=held,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        compiled=compiled,
        offload=settings.training.activation_offloading,
        graphs=recordable(settings, packed=load.packed > 0),
    )
    needed = estimate(model, load, plan).text()
    note(labelled("Memory", f"about {needed} of {free / 2**30:.0f} GB: {plan_text(plan, load)}"))
    return plan


def operations(decoder: torch.nn.Module) -> float:
    """Of training on one token: two a frozen weight in the forward pass and two for the gradient of its
    input, none for its own."""
    return 4.0 * sum(
        layer.in_features * layer.out_features
        for layer in decoder.modules()
        if isinstance(layer, torch.nn.Linear)
    )


def length_multiple(settings: Settings) -> int:
    """To which multiple of tokens the settings pad a batch. On a GPU few lengths are worth more than a few
    tokens: see `model.capture`."""
    gpu = torch.cuda.is_available() and not settings.run.use_cpu
    return settings.training.pad_to_multiple_of or (LENGTH_MULTIPLE if gpu else 1)


def training_arguments(settings: Settings, work_dir: str, *, checkpointing: bool) -> SFTConfig:
    """TRL's own configuration, built on the machine that trains: its device and precision are this
    machine's."""
    gpu = torch.cuda.is_available() and not settings.run.use_cpu
    bf16 = settings.training.bf16
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if gpu and not has_bf16 and (bf16 or settings.model.dtype == "bfloat16"):
        flag = "--bf16 true" if bf16 else "--dtype bfloat16"
        raise ConfigError(
            f"{flag}: {torch.cuda.get_device_name()} does not compute in bfloat16; leave it out, and float32 is used"
        )
    known = {option.name for option in dataclasses.fields(SFTConfig)}
    own = {name: value for name, value in vars(settings.training).items() if name in known}
    return SFTConfig(
        **{
            **own,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "output_dir": work_dir,
            "use_cpu": not gpu,
            "bf16": has_bf16 if bf16 is None else bf16,
            "gradient_checkpointing": checkpointing,
            "activation_offloading": gpu
            and settings.training.activation_offloading,  # without a GPU they are where it would put them
            "torch_compile": False,  # of the whole model; ours is by layer
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "disable_tqdm": True,
            "report_to": "none",
        }
    )


def adapter_config(settings: Settings, model: Any) -> tuple[list[str], Any]:
    """The layers of a model, or of its outline, that get adapters, and PEFT's config for them."""
    options = settings.lora
    targets = target_modules(model, options.target_modules, lora_vision=options.vision)
    config = lora_config(
        model,
        r=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=options.modules_to_save,
    )
    return targets, config


def adapted_model(
    settings: Settings, args: SFTConfig, plan: Plan, note: Callable[[str], None]
) -> tuple[Any, AcceleratedStep]:
    """The frozen base of the settings with a new adapter, on this worker's device, and its training steps.

    Where these offload activations themselves, TRL's own offloading is switched off in `args`.
    """
    base = base_of(settings, args.device, resident=plan.resident)
    adapted = attach(base, adapter_config(settings, base)[1], seed=args.seed)
    step = AcceleratedStep.for_adapter(
        adapted,
        plan,
        note,
        capturable=recordable(settings),
        mixed_precision=args.bf16 or args.fp16,
        eval_rows=args.per_device_eval_batch_size,
    )
    if step.offloads:
        args.activation_offloading = False
    return adapted, step
