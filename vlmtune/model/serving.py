"""Check by vLLM's documented rules whether it serves a LoRA adapter, without vLLM itself.

The rules: https://docs.vllm.ai/en/latest/features/lora.html, vllm.lora.peft_helper and vllm.config.lora.
"""

import re
from collections.abc import Sequence
from typing import Any

# The values of vLLM's --max-lora-rank, which must be at least an adapter's rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
# vLLM dropped cross-attention models together with its first engine, and never took LoRA on them
# (vllm-project/vllm#10824).
WITHOUT_LORA = {
    "mllama": "Llama-3.2-Vision left vLLM after 0.10.2, and no version of it took LoRA on this model"
}


def max_lora_rank(rank: int) -> int | None:
    """The value of vLLM's --max-lora-rank for an adapter of this rank, or None if it is too large."""
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def refusals(
    config: dict[str, Any], tensors: Sequence[str], *, model_type: str, language_prefix: str
) -> list[str]:
    """Why vLLM would refuse this adapter, or ignore a part of it; empty if vLLM serves it unchanged.

    Args:
        config: the content of adapter_config.json.
        tensors: the names of the tensors in adapter_model.safetensors.
        model_type: the base model's `model_type`.
        language_prefix: the prefix of the names of the language model's modules.
    """
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    modules = {name: found["module"] for name in tensors if (found := TENSOR.fullmatch(name))}
    unknown = [name for name in tensors if name not in modules]
    outside = [module for module in modules.values() if not module.startswith(language_prefix)]
    checks = [
        (model_type in WITHOUT_LORA, WITHOUT_LORA.get(model_type, "")),
        (max(ranks) > RANKS[-1], f"rank {max(ranks)} is above {RANKS[-1]}, the highest that it takes"),
        (bool(config.get("use_dora")), "it does not take DoRA"),
        (
            config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
            "it does not take adapters with a bias",
        ),
        (
            bool(config.get("modules_to_save")),
            f"it does not take modules_to_save ({', '.join(config.get('modules_to_save') or [])})",
        ),
        (
            bool(config.get("rank_pattern") or config.get("alpha_pattern")),
            "it scales all layers by one rank and alpha, and the adapter has rank_pattern or alpha_pattern",
        ),
        (
            bool(outside),
            "it puts LoRA on the language model, and leaves out the adapter's other layers "
            f"({next(iter(outside), '')})",
        ),
    ]
    # DoRA, biases and saved modules also have unknown tensors, which are not reported a second time.
    reasons = [reason for holds, reason in checks if holds]
    return reasons or [f"it does not know the tensor {name}" for name in unknown[:1]]
