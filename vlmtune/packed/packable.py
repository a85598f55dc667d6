"""Check whether an engine can train these settings. Some options need the isolated runner."""

from __future__ import annotations

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.packed.optim import OPTIMIZERS


def not_packable(settings: Settings) -> str | None:
    """The option because of which the settings cannot be trained packed, in a few words; None if they can."""
    model, lora, training = settings.model, settings.lora, settings.training
    reasons = {
        "use_dora": lora.use_dora,
        "lora_modules_to_save": bool(lora.modules_to_save),
        "lora_vision": lora.vision,
        "vision_learning_rate": lora.vision_learning_rate is not None,
        "llm_int8, with which a row's result depends on its neighbors": model.llm_int8,
        "fp16": bool(training.fp16),
        "bf16 over a float32 base": bool(training.bf16) and model.dtype == "float32",
        f"optim {training.optim}": training.optim not in OPTIMIZERS,
        "neftune_noise_alpha": training.neftune_noise_alpha is not None,
        "gradient_checkpointing_kwargs": bool(training.gradient_checkpointing_kwargs),
        "logging_nan_inf_filter": bool(training.logging_nan_inf_filter),
        "eval_on_start": bool(training.eval_on_start),
        f"num_workers {settings.run.num_workers}, whose number may change": isinstance(
            settings.run.workers, tuple
        ),
        "trust_remote_code, for a model whose layers are not known": model.trust_remote_code,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def check_packable(settings: Settings) -> None:
    """Raises ConfigError, which names the option, if the settings cannot be trained packed."""
    if (reason := not_packable(settings)) is not None:
        raise ConfigError(f"--trial_runner packed: cannot train {reason}; use --trial_runner isolated")
