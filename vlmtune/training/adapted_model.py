"""Load the frozen base of the settings, attach a new adapter, and apply the accelerations of a step."""

from collections.abc import Callable
from typing import Any, TypeVar

from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.model.base import load_base_for
from vlmtune.model.lora import attach, lora_config
from vlmtune.model.lora_targets import target_modules
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.training.step_plan import can_capture

Reference = TypeVar("Reference")


def adapted_model(
    settings: Settings,
    args: SFTConfig,
    plan: StepPlan,
    note: Callable[[str], None],
    record_reference: Callable[[Any, list[str]], Reference],
) -> tuple[Any, AcceleratedStep, Reference]:
    """Load the base, and attach an adapter, on this worker's device.

    If the steps offload activations themselves, TRL's own offloading is switched off in `args`.

    Args:
        record_reference: called with the base as transformers loads it and the names of the layers that get
            adapters. It raises an exception if the base cannot be trained.

    Returns:
        The base with its adapter, its accelerated steps, and the result of `record_reference`.
    """
    base = load_base_for(settings, args.device, dequantized=plan.dequantized)
    targets, config = adapter_config(settings, base)
    reference = record_reference(base, targets)
    adapted = attach(base, config, seed=args.seed)
    step = AcceleratedStep.for_adapter(
        adapted,
        plan,
        note,
        capturable=can_capture(settings),
        mixed_precision=args.bf16 or args.fp16,
        eval_micro_batch_size=args.per_device_eval_batch_size,
    )
    if step.offloads_checkpoints:
        args.activation_offloading = False
    return adapted, step, reference


def adapter_config(settings: Settings, model: Any) -> tuple[list[str], Any]:
    """The names of the layers that get an adapter, and PEFT's config for it.

    Args:
        model: the base model, with or without weights.

    Raises:
        ModelError: the target modules match no layer.
    """
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
