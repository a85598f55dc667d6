"""The sizes of a model that its memory and its speed follow from, read from its outline (no weights)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a vision tower keeps beside the output of each layer (masks, inner values of its last layers), counted
# in outputs of a layer.
EXTRA_VISION_OUTPUTS = 20
EXPERT_AXES = 3  # of a parameter that holds all experts of a layer: experts, outputs, inputs


@dataclass(frozen=True)
class ModelShapes:
    """Numbers of weights, layers and features of a model with an adapter.

    Attributes:
        quantized: weights of linear layers, which quantization reaches.
        decoder: weights of the linear layers of the language model.
        other: all other weights.
        largest: weights of the largest linear layer.
        layers, hidden_size, intermediate_size: of the decoder, as in its config.
        cross_layers: decoder layers that read the image by cross-attention (Mllama).
        query_size, key_value_size: output features of the decoder's query and key projections.
        vocab_size: rows of the output head.
        adapter_features: in_features + out_features, summed over the layers that get an adapter.
        adapted_inputs: in_features alone, summed over the same layers.
        vision_values: values that the vision tower keeps for each of its tokens while it runs; 0 without a
            tower.
    """

    quantized: int
    decoder: int
    other: int
    largest: int
    layers: int
    cross_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_value_size: int
    vocab_size: int
    adapter_features: int
    adapted_inputs: int
    vision_values: int


def model_shapes(outline: PreTrainedModel, targets: Sequence[str]) -> ModelShapes:
    """The sizes of a model given as its outline on the meta device, with adapters on the layers `targets`."""
    from torch import nn

    head = outline.get_output_embeddings()
    decoder = outline.get_decoder()
    in_decoder = {id(module) for module in decoder.modules()}
    linears = [module for module in outline.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(linear.weight.numel() for linear in linears)
    config = outline.config.get_text_config()
    adapted = [outline.get_submodule(name) for name in targets]
    widths = {
        leaf: max(
            (linear.out_features for name, linear in decoder.named_modules() if name.endswith(leaf)),
            default=0,
        )
        for leaf in (".q_proj", ".k_proj")
    }
    query_size = widths[".q_proj"] or config.hidden_size
    return ModelShapes(
        quantized=quantized,
        decoder=sum(linear.weight.numel() for linear in linears if id(linear) in in_decoder),
        other=sum(parameter.numel() for parameter in outline.parameters()) - quantized,
        largest=max(linear.weight.numel() for linear in linears),
        layers=config.num_hidden_layers,
        cross_layers=len(getattr(config, "cross_attention_layers", None) or []),
        hidden_size=config.hidden_size,
        intermediate_size=_largest(config.intermediate_size),
        query_size=query_size,
        key_value_size=widths[".k_proj"] or query_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else config.vocab_size,
        adapter_features=sum(
            module.in_features + module.out_features for module in adapted if isinstance(module, nn.Linear)
        ),
        adapted_inputs=sum(module.in_features for module in adapted if isinstance(module, nn.Linear)),
        vision_values=_vision_values(
            getattr(outline.config, "vision_config", None),
            max((linear.in_features for linear in linears if id(linear) not in in_decoder), default=0),
        ),
    )


def fused_expert_weights(model: PreTrainedModel) -> int:
    """Weights of experts in one parameter for a whole layer, which bitsandbytes does not quantise."""
    return sum(
        parameter.numel() for parameter in model.get_decoder().parameters() if parameter.ndim == EXPERT_AXES
    )


def _largest(size: int | Sequence[int]) -> int:
    """A size of the config, which may be one for each layer."""
    return size if isinstance(size, int) else max(size)


def _vision_values(config: Any, widest: int) -> int:
    """Values that a vision tower keeps for a token: transformers keeps the output of each of its layers.

    Args:
        widest: the input of the tower's widest layer, for a config that names no width.
    """
    if config is None:
        return 0
    layers = [getattr(config, name, 0) for name in ("num_hidden_layers", "depth", "num_global_layers")]
    width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", None) or widest
    return int((sum(layers) + EXTRA_VISION_OUTPUTS) * width)
