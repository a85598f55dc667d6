"""Answers by Ray Data actors, one to a GPU or some CPUs, in the order of the rows; tasks on CPU workers read
ahead of them."""

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import ray.data
from peft import PeftModel

from vlmtune.cluster import READ_CPUS, READ_TASKS, WORKER_CPUS, Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import without_stderr
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.ray_data import configure_ray_data, reraise_user_errors
from vlmtune.evaluation.generate import Layout, end_tokens, generate, likelihoods, question, reference
from vlmtune.model.base import base_of
from vlmtune.model.fast import lean_lora
from vlmtune.model.lora import load_adapter

ADAPTER, BASE = "adapter", "base"
Files = dict[str, bytes]  # of a folder, by name
BATCHES_PER_ACTOR = 4  # at least: starting an actor takes ten seconds
READERS_PER_GPU = 8  # a photograph of 12 megapixels takes 0.2 s, one of 640x480 5 ms
BLOCK_BYTES = (
    1 << 16
)  # what one task hands to the next: rows flow on one by one where they have an image, dozens of texts together


@dataclass(frozen=True)
class Job:
    """What the actors do, as plain values that pickle.

    `adapters`: the files of each adapter, by the name of its model, so that no node needs its folder.
    `models`: whose answers are wanted,
    in the order of the results; one without an adapter is the base. `likely`: whether the likelihood of
    references is wanted too.
    """

    values: dict[str, Any]
    adapters: dict[str, Files]
    models: tuple[str, ...]
    layout: Layout
    max_new_tokens: int
    likely: bool


def load(values: dict[str, Any], adapters: dict[str, Files], device: Any) -> Any:
    """The base of these settings on `device`, with adapters of these names, if there are any, of which
    `answering_as` chooses one."""
    model: Any = base_of(Settings.from_flags(values), device)
    for name, files in adapters.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            model = load_adapter(model, folder, name=name)
    if adapters:
        lean_lora(model)
    return model.eval()


@contextmanager
def answering_as(model: Any, name: str) -> Iterator[None]:
    """`model` with the adapter called `name` in the block; without any, where it has none of that name."""
    adapted = isinstance(model, PeftModel)
    known = adapted and name in model.peft_config
    if known:
        model.set_adapter(name, inference_mode=True)
    with model.disable_adapter() if adapted and not known else nullcontext():
        yield


class Answerer:
    """One actor. It loads the model with the first rows, so that what is wrong with it is told as an error
    of a row is."""

    def __init__(self, job: Job, adapters: list[Any]) -> None:
        """`adapters`: a reference to the job's in Ray's object store, in a list, so that Ray hands it on as
        it is."""
        self.job, self.adapters = job, adapters
        self.model: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """`row`: what tells a row, `example`: its `EncodedExample` or None, both pickled → `result`: a pickled dict
        of plain values, or None."""
        if self.model is None:
            self._load()
        given: list[EncodedExample | None] = [pickle.loads(example) for example in batch["example"]]
        found = iter(self._answer([example for example in given if example is not None]))
        return {
            "row": list(batch["row"]),
            "result": [pickle.dumps(None if example is None else next(found)) for example in given],
        }

    def _answer(self, examples: list[EncodedExample]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"question": question(self.tokenizer, one), "reference": reference(self.tokenizer, one)}
            for one in examples
        ]
        for name in self.job.models if examples else ():
            with answering_as(self.model, name):
                texts = generate(
                    self.model,
                    self.tokenizer,
                    self.job.layout,
                    examples,
                    max_new_tokens=self.job.max_new_tokens,
                    ends=self.ends,
                )
                likely = (
                    likelihoods(self.model, self.job.layout, examples)
                    if self.job.likely
                    else [(0.0, 0)] * len(examples)
                )
            for row, text, (nll, tokens) in zip(found, texts, likely, strict=True):
                row[name] = {"answer": text, "nll": nll, "tokens": tokens}
        return found

    def _load(self) -> None:
        import torch

        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        settings = Settings.from_flags(self.job.values)
        processor: Any = settings.model.ref.processor()
        self.tokenizer = processor.tokenizer
        self.model = load(self.job.values, ray.get(self.adapters[0]), device)
        self.ends = end_tokens(self.model, processor)


def run(
    job: Job,
    items: Sequence[dict[str, Any]],
    read: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    cluster: Cluster,
    *,
    rows: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """(row, result) of all rows, in their order, as they come.

    Args:
        items: what `read` takes, one after the other, in a task each.
        read: gives {"row", "example"} for each row, on a CPU worker: what tells the row, and its `EncodedExample`,
        or None for one that cannot be
            answered, whose result is None; both pickled.
        rows: how many there are, if that is known.
    """
    settings = Settings.from_flags(job.values)
    configure_ray_data()
    gpu, batch = cluster.workers_use_gpu(settings.run.use_cpu), settings.training.per_device_eval_batch_size
    actors = max(1, int(cluster.gpus if gpu else cluster.cpus))
    if rows is not None:
        actors = min(actors, -(-rows // (batch * BATCHES_PER_ACTOR)))
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    dataset.context.target_max_block_size = BLOCK_BYTES
    # On CPUs model and readers share them, and the model needs most.
    readers = min(READERS_PER_GPU * actors if gpu else READ_TASKS, len(items))
    answered = dataset.flat_map(
        read, num_cpus=READ_CPUS, compute=ray.data.TaskPoolStrategy(size=readers)
    ).map_batches(
        Answerer,
        fn_constructor_args=(replace(job, adapters={}), [ray.put(job.adapters)]),
        batch_size=batch,
        batch_format="numpy",
        num_cpus=WORKER_CPUS,
        num_gpus=1 if gpu else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    with reraise_user_errors():
        found = iter(answered.iter_rows())
        # Ray calls it an error that the pool's actors could not be started anew once this process has ended
        with without_stderr():
            first = next(found, None)
        for row in [] if first is None else chain([first], found):
            yield pickle.loads(row["row"]), pickle.loads(row["result"])
