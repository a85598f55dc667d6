"""The model that trains: the frozen base of the settings with a new adapter, and its training steps."""

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

Checked = TypeVar("Checked")


def adapted_model(
    settings: Settings,
    args: SFTConfig,
    plan: StepPlan,
    note: Callable[[str], None],
    check: Callable[[Any, list[str]], Checked],
) -> tuple[Any, AcceleratedStep, Checked]:
    """The frozen base with a new adapter on this worker's device, its steps, and what `check` returns.

    Where these offload activations themselves, TRL's own offloading is switched off in `args`.

    Args:
        check: is called with the base as transformers made it and the names of the layers that get adapters,
            and raises where it cannot be trained.
    """
    base = load_base_for(settings, args.device, dequantized=plan.dequantized)
    targets, config = adapter_config(settings, base)
    checked = check(base, targets)
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
    return adapted, step, checked


def adapter_config(settings: Settings, model: Any) -> tuple[list[str], Any]:
    """The layers of a model, with or without weights, that get adapters, and PEFT's config for them.

    Raises:
        ModelError: the target modules match nothing.
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
