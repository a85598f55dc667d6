"""The GPU memory that a run would need, estimated without a GPU."""

from vlmtune.config.settings import Settings
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.store import Store
from vlmtune.errors import ModelError
from vlmtune.model.capture import LENGTH_MULTIPLE
from vlmtune.model.memory import StepPlan, estimate_memory, size_text
from vlmtune.training.step_plan import can_capture, shapes_and_load


def gpu_memory(settings: Settings, store: Store) -> str:
    """The GPU memory of the fastest way to run a step and of the smallest way, in one line.

    Empty if the model cannot be adapted. The preflight itself needs only the processor; training says what is
    wrong with the model.
    """
    usable_rows = fitting_rows(store, settings.training.max_length, "skip")
    try:
        model, load = shapes_and_load(settings, store, usable_rows, pad_to_multiple_of=LENGTH_MULTIPLE)
    except ModelError:
        return ""
    quantized = load.quantization in ("nf4", "int8")
    graphs = can_capture(settings)
    fastest = StepPlan(
        dequantized=quantized,
        checkpointing=False,
        micro_batch_size=load.batch,
        compiled=True,
        room_for_graphs=graphs,
    )
    smallest = StepPlan(dequantized=False, checkpointing=True, micro_batch_size=1, compiled=True)
    most = size_text(estimate_memory(model, load, fastest).required_bytes)
    least = size_text(estimate_memory(model, load, smallest).step_bytes)
    return f"about {most} of a GPU at the fastest, {least} at the least; batch size {load.batch}"
