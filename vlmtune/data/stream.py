"""The batches of a prepared store in a given order: read, shortened and collated ahead of training."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray.data
import torch
from safetensors.numpy import save as save_tensors
from safetensors.torch import load as load_tensors

from vlmtune.cluster import READ_CPUS, READ_TASKS
from vlmtune.compat.ray_data import ExecutionCallback, set_execution_callback
from vlmtune.data.collate import collate
from vlmtune.data.encoded_example import shorten
from vlmtune.data.examples import read_examples
from vlmtune.data.order import BatchRows
from vlmtune.data.ray_data import configure_ray_data, reraise_user_errors
from vlmtune.data.store import Store

Batch = dict[str, torch.Tensor]

BATCHES_PER_TASK = 8
PREFETCHED_BATCHES = 4  # batches ready in the trainer's process
LOOP_SECONDS = 0.02  # the loop then takes 4 % of a core, and a short stream 0.05 s longer


class ThrottledExecutor(ExecutionCallback):
    """Makes the loop of Ray Data's executor run at most once in `LOOP_SECONDS`.

    The loop is a thread of the trainer's process. When the readers are ahead, it polls them about 2,000 times
    a second and keeps taking Python's lock (GIL) from the trainer: without this class, steps of LLaVA-1.5-7B
    took twice as long even when no data was missing.
    """

    def __init__(self) -> None:
        self.next_step = 0.0  # on the monotonic clock

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self.next_step - time.monotonic()))
        self.next_step = time.monotonic() + LOOP_SECONDS


def load_batch(
    store: Store,
    rows: np.ndarray,
    batch: BatchRows,
    max_length: int | None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, np.ndarray]:
    """One collated batch.

    Args:
        rows: the store's row numbers of the split; `batch.rows` are positions in this array.
        pad_to_multiple_of: the padded length in tokens is a multiple of it.
    """
    numbers = [int(rows[row]) for row in batch.rows]
    return collate(
        [shorten(example, max_length) for example in read_examples(store, numbers)],
        pad_token_id=store.meta.pad_token_id,
        input_format=store.meta.input_format,
        filler=batch.filler,
        pad_to_multiple_of=pad_to_multiple_of or 1,
    )


def read_batches(
    store: Store,
    split: str,
    batches: Sequence[BatchRows],
    max_length: int | None,
    *,
    pad_to_multiple_of: int | None = None,
) -> Iterator[Batch]:
    """The batches in this order, read in this process without Ray."""
    rows = store.rows_of(split)
    for batch in batches:
        arrays = load_batch(store, rows, batch, max_length, pad_to_multiple_of)
        yield {name: torch.from_numpy(array) for name, array in arrays.items()}


def stream_batches(
    store: Store,
    split: str,
    batches: Sequence[BatchRows],
    max_length: int | None,
    *,
    pad_to_multiple_of: int | None = None,
) -> Iterator[Batch]:
    """The batches in this order, read and collated by Ray Data tasks that run ahead of the caller."""
    if not batches:
        return
    configure_ray_data()
    rows = store.rows_of(split)

    def load(item: dict[str, Any]) -> dict[str, Any]:
        batch = BatchRows(tuple(int(row) for row in item["rows"]), bool(item["filler"]))
        # One binary value for each batch, because Arrow needs the same shapes in every batch.
        return {"batch": save_tensors(load_batch(store, rows, batch, max_length, pad_to_multiple_of))}

    items = [{"rows": list(batch.rows), "filler": batch.filler} for batch in batches]
    blocks = -(-len(items) // BATCHES_PER_TASK)
    order = ray.data.from_items(items, override_num_blocks=blocks)
    set_execution_callback(order, ThrottledExecutor)
    tasks = ray.data.TaskPoolStrategy(size=min(READ_TASKS, blocks))
    loaded = order.map(load, num_cpus=READ_CPUS, compute=tasks)
    with reraise_user_errors():
        for block in loaded.iter_batches(
            batch_size=1, batch_format="numpy", prefetch_batches=PREFETCHED_BATCHES
        ):
            yield load_tensors(bytes(block["batch"][0]))
