"""How much GPU memory a training step takes, before anything is loaded.

The estimate counts what the allocator holds at the peak of a step: weights, adapters with gradient and
optimizer state, activations that the backward pass needs, and the largest temporaries. It is made from the
model's shapes. `benchmarks/train_step.py` prints it beside the measured peak.
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
# The part of the GPU's memory that the allocator can use in spite of fragmentation; and what CUDA's context
# and libraries take, in bytes.
USABLE = 0.94
CONTEXT = 1.0 * GB
# Bytes that nf4 takes for a weight: half a byte, a scale in 8 bits for every 64, and a second scale for
# every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16  # weight, gradient and AdamW's two averages, in float32
# Activations of a layer that is not compiled, against one that is: casts and norms in float32 are kept.
EAGER_FACTOR = 2.2
LOSS_TILE = 32768  # columns of logits that exist at a time
LOSS_ROWS = 4096  # labelled positions whose logits exist at a time


@dataclass(frozen=True)
class StepLoad:
    """What one training step has to hold on each GPU.

    Attributes:
        batch: rows of a step on one GPU.
        length: tokens of the longest row.
        labelled_tokens: those of them that are trained on.
        cross_attention_tokens: tokens of a row's images that cross-attention reads; 0 without it.
        vision_tokens: tokens of a row in the vision tower.
        lora_rank: of the adapter, or the highest of several packed ones.
        dropout: whether LoRA has dropout: each adapted layer then keeps its own masked input.
        compute_bytes: bytes of one value in the dtype of the computation.
        packed_adapters: adapters that train packed, each on rows of its own; 0 where one trains alone.
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
    """How a step is run.

    Attributes:
        dequantized: whether the base holds its values in the dtype that it computes in.
        checkpointing: whether activations are computed again in the backward pass.
        micro_batch_size: rows that go through the model at a time.
        compiled: whether the decoder's layers are compiled.
        offload: whether checkpoints lie in the CPU's memory.
        room_for_graphs: whether memory is left for CUDA graphs of several lengths; without it, a step is
            captured where there happens to be room.
        spare_bytes: bytes of the GPU that are left.
        eval_micro_batch_size: rows that go through at a time in evaluation, at most; None sets no limit.
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
        weights: of the base.
        adapters: their weights, gradients and optimizer state.
        activations: what the forward pass keeps for the backward pass.
        temporary: the largest tensors that exist for a moment.
        further_graphs: what a step of a second shape takes on top: captured graphs keep their memory, and a
            step cannot use it before it is captured itself.
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
        """Bytes that have to be free on the GPU: those of a step, and of further captured ones."""
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
    # Each row of a packed batch has a copy of its adapter, its gradient, and the same once more where the
    # gradients are joined.
    copies = 3 * load.compute_bytes * adapter * plan.micro_batch_size if load.packed_adapters else 0
    return MemoryEstimate(
        weights=_weight_bytes(model, load, plan),
        adapters=ADAPTER_BYTES * adapter * max(load.packed_adapters, 1) + copies,
        activations=activations,
        temporary=temporary,
        # A step of another shape finds none of a captured step's memory free until it is captured too.
        further_graphs=load.second_shape_fraction * (activations + temporary) if plan.room_for_graphs else 0,
    )


def usable(capacity: float) -> float:
    """Bytes that tensors can use on a GPU with `capacity` bytes."""
    return capacity * USABLE - CONTEXT


def size_text(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 2**20:.0f} MB"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the memory of the GPU or the machine ran out, or would have."""
    return isinstance(error, DoesNotFitError) or lacks_memory(error)


def memory_shortage(error: BaseException) -> str:
    """How much memory was needed and how much was free, from torch's error or one that it caused.

    Empty if the error does not say it.
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
    """Activations that are kept for the backward pass, and the largest temporary beside them.

    A frozen layer needs no input for its backward pass. A decoder layer keeps for a token: the residual
    stream before its two blocks, queries, keys, values, the output of attention, the two inputs of the
    activation function, and the inputs of the adapters.
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
    # A captured graph keeps what the vision tower has made; steps with checkpoints are never captured.
    kept_vision = 0 if plan.checkpointing else vision
    return layers + images + kept_vision, max(logits, backward + largest_layer, vision)


def _weight_bytes(model: ModelShapes, load: StepLoad, plan: StepPlan) -> float:
    value_bytes = load.compute_bytes
    if load.quantization == "fp8":  # twice, in both orders
        return (
            value_bytes * (model.other_weights + model.linear_weights - model.decoder_linear_weights)
            + 2 * model.decoder_linear_weights
        )
    unquantized = plan.dequantized or load.quantization == "none"
    weight_bytes = value_bytes if unquantized else {"nf4": NF4_BYTES, "int8": 1.0}[load.quantization]
    return value_bytes * model.other_weights + weight_bytes * model.linear_weights
