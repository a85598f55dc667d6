"""Choose the fastest plan of a training step that fits in a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmtune.errors import DoesNotFitError
from vlmtune.model.memory import CONTEXT, USABLE, StepLoad, StepPlan, estimate_memory, size_text, usable
from vlmtune.model.shapes import ModelShapes

BUSY_TOKENS = 2048  # tokens in a micro-batch that keep a GPU busy; with fewer, each token takes more time
# The same for evaluation, which has no backward pass; including tokens of the vision tower.
EVALUATED_TOKENS = 4096
# FLOP/s of a large GPU without compiled layers. It is only used to estimate whether a run is long.
EAGER_RATE = 300e12
# Seconds of a run from which on compiling pays: it takes about 30 s and saves a quarter.
WORTH_COMPILING = 240


@dataclass(frozen=True)
class PlanOptions:
    """The parts of a plan that the settings fix. None leaves a choice to `choose_plan`.

    Attributes:
        dequantized, checkpointing, micro_batch_size, compiled, offload: as in `StepPlan`.
        sizes: the micro-batch sizes to choose from, largest first; if empty, the batch size, its half, and so
            on.
        can_capture: whether steps can be captured as CUDA graphs. Steps with gradient checkpointing never
            are.
    """

    dequantized: bool | None = None
    checkpointing: bool | None = None
    micro_batch_size: int | None = None
    sizes: tuple[int, ...] = ()
    compiled: bool = True
    offload: bool = False
    can_capture: bool = True


def choose_plan(model: ModelShapes, load: StepLoad, capacity: float, options: PlanOptions) -> StepPlan:
    """The fastest plan that fits `capacity` bytes of GPU memory.

    Raises:
        DoesNotFitError: not even one row at a time fits. The message says what would fit.
    """
    room = usable(capacity)
    plans = list(_by_speed(load, options))
    for plan in plans:
        if (spare_bytes := room - estimate_memory(model, load, plan).required_bytes) >= 0:
            rows = max(plan.micro_batch_size, EVALUATED_TOKENS // (load.length + load.vision_tokens))
            return replace(plan, spare_bytes=spare_bytes, eval_micro_batch_size=rows)
    smallest = min(plans, key=lambda plan: estimate_memory(model, load, plan).required_bytes)
    needed = estimate_memory(model, load, smallest).text()
    way_out = _what_would_fit(model, load, smallest, room)
    raise DoesNotFitError(
        f"not enough GPU memory: {plan_text(smallest, load)} still takes about {needed}, and "
        f"{size_text(room)} of {size_text(capacity)} can be used; {way_out}"
    )


def plan_text(plan: StepPlan, load: StepLoad) -> str:
    """The plan in a few words, for the console."""
    stored = "as it is" if load.quantization == "none" else f"in {load.quantization}"
    held = "base held in the type it computes in" if plan.dequantized else f"base {stored}"
    parts = "" if plan.micro_batch_size >= load.batch else f" of {load.batch}"
    checkpointing = f"{'with' if plan.checkpointing else 'no'} gradient checkpointing"
    return f"{plan.micro_batch_size}{parts} rows at a time, {held}, {checkpointing}"


def training_seconds(model: ModelShapes, tokens: float) -> float:
    """The approximate time in seconds of training on `tokens` tokens without compiled layers."""
    # For each frozen weight and token: two operations in the forward pass, and two for the gradient of the
    # input.
    return 4 * model.decoder_linear_weights * tokens / EAGER_RATE


def halves(batch: int) -> Iterator[int]:
    """`batch`, half of it, and so on, down to 1."""
    while batch > 1:
        yield batch
        batch = -(-batch // 2)
    yield 1


def _by_speed(load: StepLoad, options: PlanOptions) -> Iterator[StepPlan]:
    """Plans, the fastest first.

    Fewer rows at once cost little time down to about `BUSY_TOKENS`. Below that, gradient checkpointing costs
    less time. Captured steps with half as many rows are a little faster than a step with all rows that is not
    captured.
    """
    sizes = (
        [options.micro_batch_size] if options.micro_batch_size else list(options.sizes or halves(load.batch))
    )
    large = [size for size in sizes if size * load.length >= BUSY_TOKENS or size == sizes[0]]
    quantized = load.quantization in ("nf4", "int8")
    if options.dequantized is not None:
        dequantized_choices = [options.dequantized]
    else:
        dequantized_choices = [True, False] if quantized else [False]
    chooses_checkpointing = options.checkpointing is None
    for checkpointing in (False, True) if options.checkpointing is None else (options.checkpointing,):
        for dequantized in dequantized_choices:
            for size in large if chooses_checkpointing and not checkpointing else sizes:
                plan = StepPlan(dequantized, checkpointing, size, options.compiled, options.offload)
                if options.can_capture and not checkpointing:
                    yield from (
                        replace(plan, micro_batch_size=less, room_for_graphs=True)
                        for less in large
                        if size / 2 <= less <= size
                    )
                yield plan


def _what_would_fit(model: ModelShapes, load: StepLoad, plan: StepPlan, room: float) -> str:
    tried = []
    if load.quantization != "nf4":
        tried.append(("--quantization nf4", replace(load, quantization="nf4")))
    if load.length > 512:
        tried.append(("--max_length 512, where the images allow it", replace(load, length=512)))
    least = replace(plan, micro_batch_size=1, checkpointing=True, room_for_graphs=False)
    for what, smaller in tried:
        if estimate_memory(model, smaller, least).step_bytes <= room:
            return f"{what} would fit"
    needed = estimate_memory(model, load, plan).required_bytes
    return f"a GPU with {size_text((needed + CONTEXT) / USABLE)} would do"
