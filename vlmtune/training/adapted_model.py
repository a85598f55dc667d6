"""The model that trains: the frozen base of the settings with a new adapter, and its training steps."""

from collections.abc import Callable
from typing import Any

from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.model.base import load_base_for
from vlmtune.model.lora import attach, lora_config, target_modules
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.training.step_plan import can_capture


def adapted_model(
    settings: Settings,
    args: SFTConfig,
    plan: StepPlan,
    note: Callable[[str], None],
    check: Callable[[Any], None],
) -> tuple[Any, AcceleratedStep]:
    """The frozen base with a new adapter on this worker's device, and its training steps.

    Where these offload activations themselves, TRL's own offloading is switched off in `args`.

    Args:
        check: is called with the base as transformers made it, and raises where it cannot be trained.
    """
    base = load_base_for(settings, args.device, dequantized=plan.dequantized)
    check(base)
    adapted = attach(base, adapter_config(settings, base)[1], seed=args.seed)
    step = AcceleratedStep.for_adapter(
        adapted,
        plan,
        note,
        capturable=can_capture(settings),
        mixed_precision=args.bf16 or args.fp16,
        eval_rows=args.per_device_eval_batch_size,
    )
    if step.offloads:
        args.activation_offloading = False
    return adapted, step


def adapter_config(settings: Settings, model: Any) -> tuple[list[str], Any]:
    """The layers of a model, or of its outline, that get adapters, and PEFT's config for them.

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
