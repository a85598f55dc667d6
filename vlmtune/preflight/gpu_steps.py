"""How a model's training steps will run on a GPU: which accelerations it gets, and why not the others."""

from typing import Any

from vlmtune.compat.transformers import adds_deepstack_features
from vlmtune.config.settings import Settings
from vlmtune.errors import ModelError
from vlmtune.model.memory import size_text
from vlmtune.model.shapes import fused_expert_weights
from vlmtune.model.vision_attention import takes_varlen_attention
from vlmtune.model.vision_features import has_fixed_tower
from vlmtune.packed.packable import not_packable
from vlmtune.training.step_plan import why_not_captured


def gpu_acceleration_lines(settings: Settings) -> list[str]:
    """A line each on packing, compiled layers, CUDA graphs, vision features, self-check and experts.

    Empty if the model cannot be adapted; training then says what is wrong with it.
    """
    try:
        model = settings.model.ref.meta_model()
    except ModelError:
        return []
    unpackable = not_packable(settings)
    lines = [
        "packed: yes" if unpackable is None else f"packed: no, it cannot train {unpackable}",
        f"compiled layers: {_compiled(settings)}",
        f"CUDA graphs: {_graphs(settings, model)}",
        f"cached vision features: {_features(settings, model)}",
        f"self-check: {_self_check(settings)}",
    ]
    experts = fused_expert_weights(model)
    if experts and settings.model.base_quantization in ("nf4", "int8"):
        lines.append(
            f"experts: {size_text(2 * experts)} in bf16, because bitsandbytes quantizes no fused experts"
        )
    return lines


def _compiled(settings: Settings) -> str:
    chosen = settings.training.torch_compile
    if chosen is None:
        return "on a GPU in runs above some minutes (--torch_compile)"
    return "yes" if chosen else "no, --torch_compile false"


def _graphs(settings: Settings, model: Any) -> str:
    reason = why_not_captured(settings)
    if reason is not None:
        return f"no, {reason}"
    parts = ["the decoder"]
    if takes_varlen_attention(model):
        parts.append("not the vision tower, which reads its grids on the CPU")
    else:
        parts.append("the vision tower")
    deepstack = adds_deepstack_features(model.get_decoder())
    deepstack_text = ", with its deep-stack features as whole tensors" if deepstack else ""
    return f"{' and '.join(parts)}{deepstack_text}, where no checkpointing is needed"


def _features(settings: Settings, model: Any) -> str:
    if settings.lora.vision or settings.lora.modules_to_save:
        return "no, the vision tower or what follows it is trained"
    if not hasattr(model.base_model, "get_image_features"):
        return f"no, {type(model).__name__} gives no image features"
    if not has_fixed_tower(model):
        return "no, the vision tower has dropout"
    return "yes, where the first rows show that the decoder gets the same from them"


def _self_check(settings: Settings) -> str:
    if not settings.training.self_check:
        return "no, --self_check false"
    return "before the first step; an acceleration that changes losses or gradients is left out"
