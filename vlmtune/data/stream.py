"""The stream of micro-batches out of a prepared store, in the order that `order.py` gives: read, cut,
collated ahead of training."""

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
from vlmtune.data.examples import read_examples
from vlmtune.data.order import MicroBatch
from vlmtune.data.ray_data import configure_ray_data, reraise_user_errors
from vlmtune.data.store import Store
from vlmtune.data.tokenize import shorten

Batch = dict[str, torch.Tensor]

BATCHES_PER_TASK = 8
AHEAD = 4  # micro-batches kept ready in the trainer's process
LOOP_SECONDS = 0.02  # 4 % of a core, and 0.05 s of a short stream


class Paced(ExecutionCallback):
    """Makes the loop of Ray Data's executor, a thread of the trainer's process, run once in `LOOP_SECONDS`
    and not more often.

    When the readers have more ready than there is room for, it asks them some 2,000 times a second. That
    takes Python's lock from the
    trainer: steps of LLaVA-1.5-7B, which wait for no data, took twice as long.
    """

    def __init__(self) -> None:
        self.next = 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self.next - time.monotonic()))
        self.next = time.monotonic() + LOOP_SECONDS


def load_batch(
    store: Store, rows: np.ndarray, batch: MicroBatch, max_length: int | None, multiple: int | None = None
) -> dict[str, np.ndarray]:
    """One collated micro-batch, padded to a `multiple` of tokens. `rows` are the store's row numbers of the
    split, which `batch.rows`
    counts in."""
    examples = [
        shorten(example, max_length)
        for example in read_examples(store, [int(rows[row]) for row in batch.rows])
    ]
    meta = store.meta
    return collate(
        examples,
        pad_token_id=meta.pad_token_id,
        per_row=meta.pixels.per_row,
        filler=batch.filler,
        multiple=multiple or 1,
    )


def read_batches(
    store: Store,
    split: str,
    batches: Sequence[MicroBatch],
    max_length: int | None,
    *,
    multiple: int | None = None,
) -> Iterator[Batch]:
    """The micro-batches, read in this process without Ray."""
    rows = store.rows_of(split)
    for batch in batches:
        yield {
            name: torch.from_numpy(value)
            for name, value in load_batch(store, rows, batch, max_length, multiple).items()
        }


def stream_batches(
    store: Store,
    split: str,
    batches: Sequence[MicroBatch],
    max_length: int | None,
    *,
    multiple: int | None = None,
) -> Iterator[Batch]:
    """The same micro-batches, read and collated by Ray Data tasks that run ahead of the caller."""
    if not batches:
        return
    configure_ray_data()
    rows = store.rows_of(split)

    def load(item: dict[str, Any]) -> dict[str, Any]:
        batch = MicroBatch(tuple(int(row) for row in item["rows"]), bool(item["filler"]))
        # One blob a batch: Arrow would want the same shapes from every batch.
        return {"batch": save_tensors(load_batch(store, rows, batch, max_length, multiple))}

    items = [{"rows": list(batch.rows), "filler": batch.filler} for batch in batches]
    blocks = -(-len(items) // BATCHES_PER_TASK)
    given = ray.data.from_items(items, override_num_blocks=blocks)
    set_execution_callback(given, Paced)
    dataset = given.map(
        load, num_cpus=READ_CPUS, compute=ray.data.TaskPoolStrategy(size=min(READ_TASKS, blocks))
    )
    with reraise_user_errors():
        for part in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=AHEAD):
            yield load_tensors(bytes(part["batch"][0]))
