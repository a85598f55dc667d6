"""How much GPU memory a run takes, before anything is loaded, and the fastest way that fits.

The estimate counts what the allocator holds at the peak of a step: weights, adapters with gradient and
optimizer state, activations that
the backward pass needs, and the largest temporaries. It is made from the model's outline (shapes without
weights).
`benchmarks/train_step.py` prints it beside the measured peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlmtune.errors import DoesNotFitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GB = 2**30
# What the allocator loses between blocks, and the context and libraries of the GPU, which no tensor is
# charged for.
USABLE = 0.94
CONTEXT = 1.0 * GB
# Bytes that nf4 takes for a weight: half a byte, a scale in 8 bits for every 64, and a second scale for
# every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16  # weight, gradient and AdamW's two averages, in float32
# activations of a layer that is not compiled, against one that is: casts and norms in float32 are kept
EAGER_FACTOR = 2.2
# what a vision tower keeps beside the output of each layer, in such outputs: masks, and its last layers'
# inner values
VISION_LAYERS = 20
EVALUATED_TOKENS = 4096  # the tower's included: as many keep a GPU busy without a backward pass
LOSS_TILE = 32768  # columns of logits that exist at a time
EAGER_RATE = (
    300e12  # operations a second of a large GPU without compiled layers; only to guess whether a run is long
)
WORTH_COMPILING = 240  # seconds that a run takes without; compiling takes about 30 and saves a quarter


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that its memory follows from.

    Attributes:
        quantized: weights in linear layers that are quantised; `other`: the rest.
        decoder: those of them that are the language model's.
        largest: weights of the largest quantised layer.
        layers, hidden, intermediate, attention, key_value: of the decoder; the last two are the widths of
        queries and of keys.
        cross_layers: decoder layers that read the image (Mllama).
        vocabulary: rows of the output head.
        adapter: in_features + out_features, summed over the layers that get an adapter; `adapted`:
        in_features alone.
        vision: numbers that the vision tower keeps for each of its tokens while it runs; 0 without one.
    """

    quantized: int
    decoder: int
    other: int
    largest: int
    layers: int
    cross_layers: int
    hidden: int
    intermediate: int
    attention: int
    key_value: int
    vocabulary: int
    adapter: int
    adapted: int
    vision: int


@dataclass(frozen=True)
class Load:
    """What one step of a run asks for on each GPU.

    Attributes:
        batch: rows a step and GPU; `length`: tokens of the longest row; `labelled`: of them trained on.
        image_tokens: tokens that cross-attention reads, a row; `vision_tokens`: those of the vision tower.
        dropout: whether LoRA has one: each adapted layer then keeps an input of its own.
        compute_bytes: of a number in the computation's type.
        packed: adapters that train together, each on rows of its own; 0 where one trains alone.
    """

    quantization: Literal["none", "nf4", "int8", "fp8"]
    batch: int
    length: int
    labelled: int
    image_tokens: int
    rank: int
    vision_tokens: int = 0
    dropout: bool = True
    compute_bytes: int = 2
    packed: int = 0


@dataclass(frozen=True)
class Plan:
    """How a step is run: which values the base holds, which activations are kept, and how many rows go
    through at once.

    `graphs`: whether memory is left for recorded steps (`model.capture`) beside others; without, a step is
    recorded where there happens to
    be room. `spare`: bytes of the GPU that are left. `evaluated`: at most so many rows are evaluated at
    once; None for as many as asked.
    """

    resident: bool
    checkpointing: bool
    micro_batch: int
    compiled: bool
    offload: bool = False
    graphs: bool = False
    spare: float = 0.0
    evaluated: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step. `graphs`: what recorded steps keep for themselves, beside those of steps
    that are not recorded."""

    weights: float
    adapters: float
    activations: float
    temporary: float
    graphs: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.activations + self.temporary

    @property
    def reserved(self) -> float:
        """All that has to be free on the GPU."""
        return self.total + self.graphs

    def text(self) -> str:
        held, working = self.weights + self.adapters, self.activations + self.temporary
        graphs = f", and up to {size_text(self.graphs)} for further CUDA graphs," if self.graphs else ""
        return f"{size_text(self.total)} (base and adapter {size_text(held)}, activations {size_text(working)}){graphs}"


def shapes(outline: PreTrainedModel, targets: Sequence[str]) -> Shapes:
    """The sizes of a model given as its outline on the meta device, with adapters on the layers named
    `targets`."""
    from torch import nn

    head = outline.get_output_embeddings()
    decoder = outline.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    linears = [module for module in outline.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(linear.weight.numel() for linear in linears)
    every = sum(parameter.numel() for parameter in outline.parameters())
    config = outline.config.get_text_config()
    chosen = [outline.get_submodule(name) for name in targets]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shapes(
        quantized=quantized,
        decoder=sum(linear.weight.numel() for linear in linears if id(linear) in inside),
        other=every - quantized,
        largest=max(linear.weight.numel() for linear in linears),
        layers=config.num_hidden_layers,
        cross_layers=len(getattr(config, "cross_attention_layers", None) or []),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        attention=heads * width,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=head.out_features if isinstance(head, nn.Linear) else config.vocab_size,
        adapter=sum(
            module.in_features + module.out_features for module in chosen if isinstance(module, nn.Linear)
        ),
        adapted=sum(module.in_features for module in chosen if isinstance(module, nn.Linear)),
        vision=_vision_numbers(getattr(outline.config, "vision_config", None)),
    )


def _vision_numbers(config: Any) -> int:
    """The models of transformers keep the output of every layer of their tower, of which they use few."""
    if config is None:
        return 0
    layers = [getattr(config, name, 0) for name in ("num_hidden_layers", "depth", "num_global_layers")]
    return int((sum(layers) + VISION_LAYERS) * (getattr(config, "embed_dim", None) or config.hidden_size))


def estimate(model: Shapes, load: Load, plan: Plan) -> Estimate:
    """Peak memory of a training step.

    A frozen layer needs no input for its backward pass; what is kept for a token in a decoder layer is the
    residual stream before its two
    blocks, queries, keys, values and the output of attention, the two inputs of the activation function, and
    the inputs of the adapters.
    """
    tokens = plan.micro_batch * load.length
    wide = load.compute_bytes
    inputs = model.adapted / model.layers if load.dropout else 2 * model.hidden
    kept = wide * (
        2 * model.hidden + 2 * model.attention + 2 * model.key_value + 2 * model.intermediate + inputs
    )
    layer = tokens * kept * (1 if plan.compiled else EAGER_FACTOR)
    images = (
        plan.micro_batch
        * load.image_tokens
        * wide
        * (model.hidden + 2 * model.cross_layers * model.key_value)
    )
    vision = (
        plan.micro_batch * load.vision_tokens * wide * model.vision
    )  # a recorded graph keeps it, and checkpoints have no graphs
    boundary = tokens * wide * model.hidden
    passed = (
        model.layers if load.image_tokens else model.layers - model.cross_layers
    )  # rows without an image skip those
    layers = layer + (2 if plan.offload else passed) * boundary if plan.checkpointing else passed * layer
    logits = min(plan.micro_batch * load.labelled, 4096) * min(model.vocabulary, LOSS_TILE) * 4 * 2
    backward = tokens * wide * 3 * model.intermediate
    dequantized = 0 if plan.resident or load.quantization in ("none", "fp8") else 2 * wide * model.largest
    one = load.rank * model.adapter
    # Packed rows have a copy of their adapter each, its gradient, and the same once more where the gradients
    # are joined.
    copies = 3 * wide * one * plan.micro_batch if load.packed else 0
    activations = layers + images + (0 if plan.checkpointing else vision)
    temporary = max(logits, backward + dequantized, vision)
    return Estimate(
        weights=_weight_bytes(model, load, plan),
        adapters=ADAPTER_BYTES * one * max(load.packed, 1) + copies,
        activations=activations,
        temporary=temporary,
        graphs=activations + temporary
        if plan.graphs
        else 0,  # a step of another length finds none of it free
    )


def seconds_of(model: Shapes, tokens: float) -> float:
    """About how long training on so many tokens takes: four operations a frozen weight, forward and for the
    input's gradient."""
    return 4 * model.decoder * tokens / EAGER_RATE


def _weight_bytes(model: Shapes, load: Load, plan: Plan) -> float:
    wide = load.compute_bytes
    if load.quantization == "fp8":  # twice, in both orders
        return wide * (model.other + model.quantized - model.decoder) + 2 * model.decoder
    each = (
        wide
        if plan.resident or load.quantization == "none"
        else {"nf4": NF4_BYTES, "int8": 1.0}[load.quantization]
    )
    return wide * model.other + each * model.quantized


def choose(
    model: Shapes,
    load: Load,
    capacity: float,
    *,
    resident: bool | None = None,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
    compiled: bool = True,
    offload: bool = False,
    graphs: bool = True,
) -> Plan:
    """The fastest plan that fits `capacity` bytes of GPU memory; what is not None is given.

    Args:
        graphs: whether steps can be recorded. Those with checkpoints never are.

    Raises:
        DoesNotFitError: not even one row at a time fits, with the numbers and what would.
    """
    room = usable(capacity)
    plans = list(_by_speed(load, resident, checkpointing, micro_batch, compiled, offload, graphs))
    for plan in plans:
        if (spare := room - estimate(model, load, plan).reserved) >= 0:
            evaluated = max(plan.micro_batch, EVALUATED_TOKENS // (load.length + load.vision_tokens))
            return replace(plan, spare=spare, evaluated=evaluated)
    least = min(plans, key=lambda plan: estimate(model, load, plan).reserved)
    raise DoesNotFitError(
        f"not enough GPU memory: {plan_text(least, load)} still takes about {estimate(model, load, least).text()}, "
        f"and {size_text(room)} of {size_text(capacity)} can be used; {_what_would_fit(model, load, least, room)}"
    )


def usable(capacity: float) -> float:
    """Bytes that tensors can have of so many on a GPU."""
    return capacity * USABLE - CONTEXT


def _by_speed(
    load: Load,
    resident: bool | None,
    checkpointing: bool | None,
    micro_batch: int | None,
    compiled: bool,
    offload: bool,
    graphs: bool,
) -> Iterator[Plan]:
    """Plans from the fastest to the smallest. Fewer rows at a time cost little down to about 2,000 tokens,
    then computing again less.

    Recorded steps of half as many rows are a little faster than all rows in a step that is not recorded.
    """
    sizes = [micro_batch] if micro_batch else list(halves(load.batch))
    large = [size for size in sizes if size * load.length >= 2048 or size == sizes[0]]
    dequantized = load.quantization in ("nf4", "int8")
    residents = [resident] if resident is not None else [True, False] if dequantized else [False]
    for again in (False, True) if checkpointing is None else (checkpointing,):
        for held in residents:
            for size in large if not again and checkpointing is None else sizes:
                if graphs and not again:
                    yield from (
                        Plan(held, again, less, compiled, offload, graphs=True)
                        for less in (size, -(-size // 2))
                        if less in large
                    )
                yield Plan(held, again, size, compiled, offload)


def halves(batch: int) -> Iterator[int]:
    """The number, half of it, and so on, to 1."""
    while batch > 1:
        yield batch
        batch = -(-batch // 2)
    yield 1


def _what_would_fit(model: Shapes, load: Load, plan: Plan, room: float) -> str:
    tried = []
    if load.quantization != "nf4":
        tried.append(("--quantization nf4", replace(load, quantization="nf4")))
    if load.length > 512:
        tried.append(("--max_length 512, where the images allow it", replace(load, length=512)))
    for what, smaller in tried:
        if (
            estimate(model, smaller, replace(plan, micro_batch=1, checkpointing=True, graphs=False)).total
            <= room
        ):
            return f"{what} would fit"
    return f"a GPU with {size_text((estimate(model, load, plan).reserved + CONTEXT) / USABLE)} would do"


def plan_text(plan: Plan, load: Load) -> str:
    """The plan in a few words, for the console."""
    stored = "as it is" if load.quantization == "none" else f"in {load.quantization}"
    held = "base held in the type it computes in" if plan.resident else f"base {stored}"
    parts = "" if plan.micro_batch >= load.batch else f" of {load.batch}"
    return f"{plan.micro_batch}{parts} rows at a time, {held}, {'with' if plan.checkpointing else 'no'} gradient checkpointing"


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised an error for want of memory, of its GPU or its machine, or a run did not begin
    because it would."""
    import torch

    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch has no class of its own for these
    return isinstance(error, torch.OutOfMemoryError | DoesNotFitError) or any(
        text in str(error) for text in texts
    )


def size_text(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 2**20:.0f} MB"
