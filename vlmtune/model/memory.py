"""Estimate the GPU memory of a training step from the model's shapes, before anything is loaded.

The estimate counts the memory at the peak of a step: weights, adapters with gradients and optimizer state,
activations that the backward pass needs, and the largest temporary tensors. `benchmarks/train_step.py` prints
it beside the measured peak.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import psutil

from vlmtune.errors import DoesNotFitError
from vlmtune.library_errors import lacks_memory
from vlmtune.model.shapes import ModelShapes

GB = 2**30
# The fraction of the GPU's memory that the allocator can use in spite of fragmentation, and the bytes that
# CUDA's context and libraries take.
USABLE = 0.94
CONTEXT = 1.0 * GB
# Bytes of a weight in nf4: half a byte, an 8-bit scale for every 64 weights, and a float32 scale for every
# 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16  # weight, gradient and AdamW's two averages, in float32
# Activations of a layer that is not compiled, as a multiple of a compiled layer's: casts and norms are kept
# in float32.
EAGER_FACTOR = 2.2
LOSS_TILE = 32768  # columns of logits (vocabulary) that exist at a time
LOSS_ROWS = 4096  # labelled positions whose logits exist at a time


@dataclass(frozen=True)
class StepLoad:
    """The size of a training step on each GPU.

    Attributes:
        quantization: how the base's weights are stored.
        batch: rows of a step on one GPU.
        length: tokens of the longest row.
        labelled_tokens: labelled tokens of that row.
        cross_attention_tokens: tokens of a row's images that cross-attention reads; 0 without
            cross-attention.
        vision_tokens: tokens of a row in the vision tower.
        lora_rank: the rank of the adapter; the highest rank of several packed adapters.
        dropout: whether LoRA has dropout, for which each adapted layer keeps its own masked input.
        compute_bytes: bytes of one value in the dtype of the computation.
        packed_adapters: number of adapters that train packed, each on its own rows; 0 for isolated training.
        second_shape_fraction: tokens of a batch of the second-largest shape, as a fraction of the largest
            batch's.
    """

    quantization: Literal["none", "nf4", "int8", "fp8"]
    batch: int
    length: int
    labelled_tokens: int
    cross_attention_tokens: int
    lora_rank: int
    vision_tokens: int = 0
    dropout: bool = True
    compute_bytes: int = 2
    packed_adapters: int = 0
    second_shape_fraction: float = 1.0


@dataclass(frozen=True)
class StepPlan:
    """How a training step runs.

    Attributes:
        dequantized: whether quantized weights are unpacked once and held in the dtype of the computation.
        checkpointing: whether activations are computed again in the backward pass.
        micro_batch_size: rows that the model computes at a time.
        compiled: whether the decoder's layers are compiled.
        offload: whether gradient checkpoints are held in the CPU's memory.
        room_for_graphs: whether memory is reserved for CUDA graphs of several shapes. Without it, a step is
            captured only if there happens to be enough memory.
        spare_bytes: bytes of GPU memory that the plan leaves free.
        eval_micro_batch_size: largest number of rows at a time in evaluation; None for no limit.
    """

    dequantized: bool
    checkpointing: bool
    micro_batch_size: int
    compiled: bool
    offload: bool = False
    room_for_graphs: bool = False
    spare_bytes: float = 0.0
    eval_micro_batch_size: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step.

    Attributes:
        weights: the base's weights.
        adapters: the adapters' weights, gradients and optimizer state.
        activations: tensors that the forward pass keeps for the backward pass.
        temporary: the largest tensors that exist for a short time.
        further_graphs: additional memory for a step of a second shape: captured graphs keep their memory, and
            a step cannot use that memory before it is captured itself.
    """

    weights: float
    adapters: float
    activations: float
    temporary: float
    further_graphs: float = 0.0

    @property
    def step_bytes(self) -> float:
        """Bytes of a step that is not captured."""
        return self.weights + self.adapters + self.activations + self.temporary

    @property
    def required_bytes(self) -> float:
        """Bytes that have to be free on the GPU: for a step and for further graphs."""
        return self.step_bytes + self.further_graphs

    def text(self) -> str:
        """The estimate in a few words, for the console."""
        held, working = self.weights + self.adapters, self.activations + self.temporary
        graphs = (
            f", and up to {size_text(self.further_graphs)} for further CUDA graphs,"
            if self.further_graphs
            else ""
        )
        parts = f"base and adapter {size_text(held)}, activations {size_text(working)}"
        return f"{size_text(self.step_bytes)} ({parts}){graphs}"


def estimate_memory(model: ModelShapes, load: StepLoad, plan: StepPlan) -> MemoryEstimate:
    """Peak memory of a training step."""
    activations, temporary = _activation_bytes(model, load, plan)
    adapter = load.lora_rank * model.adapter_features
    # Each row of a packed batch has a copy of its adapter, a gradient, and a second copy of the gradient
    # while gradients are concatenated.
    copies = 3 * load.compute_bytes * adapter * plan.micro_batch_size if load.packed_adapters else 0
    return MemoryEstimate(
        weights=_weight_bytes(model, load, plan),
        adapters=ADAPTER_BYTES * adapter * max(load.packed_adapters, 1) + copies,
        activations=activations,
        temporary=temporary,
        # A step of another shape cannot use a captured step's memory before it is captured itself.
        further_graphs=load.second_shape_fraction * (activations + temporary) if plan.room_for_graphs else 0,
    )


def usable(capacity: float) -> float:
    """Bytes that tensors can use on a GPU with `capacity` bytes."""
    return capacity * USABLE - CONTEXT


def size_text(size: float) -> str:
    """Bytes in GB or MB."""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 2**20:.0f} MB"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory of the GPU or the machine ran out, or would run out."""
    return isinstance(error, DoesNotFitError) or lacks_memory(error)


def memory_shortage(error: BaseException) -> str:
    """How much memory was needed and how much was free, from torch's error or an error that it caused.

    Empty if the error does not say so.
    """
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(texts)
    gpu = re.search(
        r"Tried to allocate ([\d.]+ \w+).*?total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)", text
    )
    if gpu is not None:
        needed, total, free = gpu.groups()
        return f"{needed} more were needed, {free} of the GPU's {total} were free"
    cpu = re.search(r"you tried to allocate (\d+) bytes", text)
    if cpu is not None:
        free = size_text(psutil.virtual_memory().available)
        return f"{size_text(int(cpu.group(1)))} more were needed, {free} of the machine's memory were free"
    return ""


def _activation_bytes(model: ModelShapes, load: StepLoad, plan: StepPlan) -> tuple[float, float]:
    """Bytes of the activations that are kept for the backward pass, and of the largest temporary tensors.

    A frozen linear layer needs no input for its backward pass. For each token, a decoder layer keeps the
    residual stream before its two blocks, queries, keys, values, the output of attention, the two inputs of
    the activation function, and the inputs of the adapters.
    """
    rows, value_bytes = plan.micro_batch_size, load.compute_bytes
    tokens = rows * load.length
    adapter_inputs = (
        model.adapter_in_features / model.decoder_layers if load.dropout else 2 * model.hidden_size
    )
    residual, attention = 2 * model.hidden_size, 2 * model.query_size + 2 * model.key_value_size
    token_bytes = value_bytes * (residual + attention + 2 * model.intermediate_size + adapter_inputs)
    layer = tokens * token_bytes * (1 if plan.compiled else EAGER_FACTOR)
    keys_of_images = model.hidden_size + 2 * model.cross_attention_layers * model.key_value_size
    images = rows * load.cross_attention_tokens * value_bytes * keys_of_images
    vision = rows * load.vision_tokens * value_bytes * model.vision_values_per_token
    layer_input = tokens * value_bytes * model.hidden_size
    # Rows without an image skip the layers of cross-attention.
    skipped = 0 if load.cross_attention_tokens else model.cross_attention_layers
    layer_count = model.decoder_layers - skipped
    if plan.checkpointing:
        layers = layer + (2 if plan.offload else layer_count) * layer_input
    else:
        layers = layer_count * layer
    logits = min(rows * load.labelled_tokens, LOSS_ROWS) * min(model.vocab_size, LOSS_TILE) * 4 * 2
    backward = tokens * value_bytes * 3 * model.intermediate_size
    dequantizes = not plan.dequantized and load.quantization in ("nf4", "int8")
    largest_layer = 2 * value_bytes * model.largest_linear_weights if dequantizes else 0
    # A captured graph keeps the vision tower's output. Steps with gradient checkpointing are never captured.
    kept_vision = 0 if plan.checkpointing else vision
    return layers + images + kept_vision, max(logits, backward + largest_layer, vision)


def _weight_bytes(model: ModelShapes, load: StepLoad, plan: StepPlan) -> float:
    value_bytes = load.compute_bytes
    if load.quantization == "fp8":  # stored twice, the second time transposed
        return (
            value_bytes * (model.other_weights + model.linear_weights - model.decoder_linear_weights)
            + 2 * model.decoder_linear_weights
        )
    unquantized = plan.dequantized or load.quantization == "none"
    weight_bytes = value_bytes if unquantized else {"nf4": NF4_BYTES, "int8": 1.0}[load.quantization]
    return value_bytes * model.other_weights + weight_bytes * model.linear_weights
