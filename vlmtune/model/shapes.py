"""`ModelShapes`: the sizes of a model that its memory and speed depend on, from its meta model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Memory that a vision tower keeps in addition to the output of each layer (masks, inner values of its last
# layers), in outputs of a layer.
EXTRA_VISION_OUTPUTS = 20
EXPERT_AXES = 3  # axes of a parameter that holds all experts of a layer: experts, outputs, inputs


@dataclass(frozen=True)
class ModelShapes:
    """Numbers of weights, layers and features of a model with an adapter.

    Attributes:
        linear_weights: weights of all linear layers except the head: those that are quantized.
        decoder_linear_weights: weights of the decoder's linear layers.
        other_weights: all other weights.
        largest_linear_weights: weights of the largest linear layer.
        decoder_layers, hidden_size, intermediate_size: sizes of the decoder, from its config.
        cross_attention_layers: decoder layers that read the image by cross-attention (Mllama).
        query_size, key_value_size: output features of the decoder's query and key projections.
        vocab_size: rows of the output head.
        adapter_features: in_features + out_features, summed over the layers that get an adapter.
        adapter_in_features: in_features, summed over the same layers.
        vision_values_per_token: values that the vision tower keeps for each of its tokens while it runs; 0
            for a model without a tower.
    """

    linear_weights: int
    decoder_linear_weights: int
    other_weights: int
    largest_linear_weights: int
    decoder_layers: int
    cross_attention_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_value_size: int
    vocab_size: int
    adapter_features: int
    adapter_in_features: int
    vision_values_per_token: int


def model_shapes(meta_model: PreTrainedModel, targets: Sequence[str]) -> ModelShapes:
    """The sizes of a model on the meta device, with adapters on the layers `targets`."""
    from torch import nn

    head = meta_model.get_output_embeddings()
    decoder = meta_model.get_decoder()
    in_decoder = {id(module) for module in decoder.modules()}
    linears = [
        module for module in meta_model.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    linear_weights = sum(linear.weight.numel() for linear in linears)
    config = meta_model.config.get_text_config()
    adapted = [meta_model.get_submodule(name) for name in targets]
    widths = {
        leaf: max(
            (linear.out_features for name, linear in decoder.named_modules() if name.endswith(leaf)),
            default=0,
        )
        for leaf in (".q_proj", ".k_proj")
    }
    query_size = widths[".q_proj"] or config.hidden_size
    return ModelShapes(
        linear_weights=linear_weights,
        decoder_linear_weights=sum(linear.weight.numel() for linear in linears if id(linear) in in_decoder),
        other_weights=sum(parameter.numel() for parameter in meta_model.parameters()) - linear_weights,
        largest_linear_weights=max(linear.weight.numel() for linear in linears),
        decoder_layers=config.num_hidden_layers,
        cross_attention_layers=len(getattr(config, "cross_attention_layers", None) or []),
        hidden_size=config.hidden_size,
        intermediate_size=_largest(config.intermediate_size),
        query_size=query_size,
        key_value_size=widths[".k_proj"] or query_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else config.vocab_size,
        adapter_features=sum(
            module.in_features + module.out_features for module in adapted if isinstance(module, nn.Linear)
        ),
        adapter_in_features=sum(module.in_features for module in adapted if isinstance(module, nn.Linear)),
        vision_values_per_token=_vision_values(
            getattr(meta_model.config, "vision_config", None),
            max((linear.in_features for linear in linears if id(linear) not in in_decoder), default=0),
        ),
    )


def fused_expert_weights(model: PreTrainedModel) -> int:
    """Number of weights in parameters that hold all experts of a layer; these are not quantized."""
    return sum(
        parameter.numel() for parameter in model.get_decoder().parameters() if parameter.ndim == EXPERT_AXES
    )


def _largest(size: int | Sequence[int]) -> int:
    """The largest value of a size in the config, which may have one value for each layer."""
    return size if isinstance(size, int) else max(size)


def _vision_values(config: Any, widest: int) -> int:
    """Values that a vision tower keeps for a token, because transformers keeps the output of each layer.

    Args:
        widest: input features of the tower's widest layer, for a config without a width.
    """
    if config is None:
        return 0
    layers = [getattr(config, name, 0) for name in ("num_hidden_layers", "depth", "num_global_layers")]
    width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", None) or widest
    return int((sum(layers) + EXTRA_VISION_OUTPUTS) * width)
