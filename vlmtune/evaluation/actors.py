"""Answer rows with Ray Data actors, one on each GPU or on some CPUs, in the order of the rows.

Tasks on CPU workers read rows ahead of the actors.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import ray
import ray.data

from vlmtune.cluster import READ_CPUS, READ_TASKS, WORKER_CPUS, Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import without_stderr
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.ray_data import configure_ray_data, reraise_user_errors
from vlmtune.evaluation.adapter import AdapterFiles, answering_as, load_model
from vlmtune.evaluation.generate import (
    BatchBuilder,
    end_tokens,
    generate,
    likelihoods,
    question,
    reference,
)

ADAPTER, BASE = "adapter", "base"  # names of models in an AnswerJob
MIN_BATCHES_PER_ACTOR = 4  # fewer are not worth one more actor, which takes ten seconds to start
READERS_PER_GPU = 8  # reading a photograph of 12 megapixels takes 0.2 s, one of 640x480 5 ms
# Bytes that one task passes to the next at once: one row with an image, or a dozen text rows.
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class AnswerJob:
    """What the actors do. Can be pickled.

    Attributes:
        settings: the base model and how it is loaded.
        adapters: the files of each adapter, by its model's name, so that no node needs the adapter's folder.
        models: names of the models that answer, in the order of the results. A name without an adapter is the
            base.
        batches: makes batches of examples.
        max_new_tokens: the longest answer in tokens.
        likelihoods: whether to compute the likelihood of the references too.
    """

    settings: Settings
    adapters: dict[str, AdapterFiles]
    models: tuple[str, ...]
    batches: BatchBuilder
    max_new_tokens: int
    likelihoods: bool


class AnswerActor:
    """A class for Ray Data's `map_batches`, which starts actors of it.

    It loads the model with its first batch, so that a loading error is raised like the error of a row.
    """

    def __init__(self, job: AnswerJob, adapters: list[Any]) -> None:
        """Store the job.

        Args:
            job: without its adapters.
            adapters: the ObjectRef of the job's adapters, in a list so that Ray does not resolve it.
        """
        self.job, self.adapters = job, adapters
        self.model: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a batch of rows.

        Args:
            batch: `row`, which identifies a row, and `example`, its `EncodedExample` or None; both pickled.

        Returns:
            `row` as it was, and `result`: a pickled dict of plain values, or None for a row without example.
        """
        if self.model is None:
            self._load()
        examples: list[EncodedExample | None] = [pickle.loads(example) for example in batch["example"]]
        results = iter(self._answer([example for example in examples if example is not None]))
        return {
            "row": list(batch["row"]),
            "result": [pickle.dumps(None if example is None else next(results)) for example in examples],
        }

    def _answer(self, examples: list[EncodedExample]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [
            {"question": question(self.tokenizer, one), "reference": reference(self.tokenizer, one)}
            for one in examples
        ]
        job = self.job
        for name in job.models if examples else ():
            with answering_as(self.model, name):
                texts = generate(
                    self.model,
                    self.tokenizer,
                    job.batches,
                    examples,
                    max_new_tokens=job.max_new_tokens,
                    ends=self.ends,
                )
                losses = (
                    likelihoods(self.model, job.batches, examples)
                    if job.likelihoods
                    else [(0.0, 0)] * len(examples)
                )
            for result, text, (nll, tokens) in zip(results, texts, losses, strict=True):
                result[name] = {"answer": text, "nll": nll, "tokens": tokens}
        return results

    def _load(self) -> None:
        import torch

        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        processor: Any = self.job.settings.model.ref.processor()
        self.tokenizer = processor.tokenizer
        self.model = load_model(self.job.settings, ray.get(self.adapters[0]), device)
        self.ends = end_tokens(self.model, processor)


def answer_rows(
    job: AnswerJob,
    items: Sequence[dict[str, Any]],
    read: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    cluster: Cluster,
    *,
    rows: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Answer all rows. Yields (row, result) in their order, each as soon as it is there.

    Args:
        items: arguments of `read`, which is called once with each item, in a task.
        read: yields {"row", "example"} for each row on a CPU worker: what identifies the row, and its
            `EncodedExample`, or None for a row that cannot be answered (its result is None); both pickled.
        rows: number of rows, if it is known.
    """
    configure_ray_data()
    gpu = cluster.workers_use_gpu(job.settings.run.use_cpu)
    batch = job.settings.training.per_device_eval_batch_size
    actors = max(1, int(cluster.gpus if gpu else cluster.cpus))
    if rows is not None:
        actors = min(actors, -(-rows // (batch * MIN_BATCHES_PER_ACTOR)))
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    dataset.context.target_max_block_size = BLOCK_BYTES
    # Without GPUs, model and readers share the CPUs, and the model needs most of them.
    readers = min(READERS_PER_GPU * actors if gpu else READ_TASKS, len(items))
    answered = dataset.flat_map(
        read, num_cpus=READ_CPUS, compute=ray.data.TaskPoolStrategy(size=readers)
    ).map_batches(
        AnswerActor,
        fn_constructor_args=(replace(job, adapters={}), [ray.put(job.adapters)]),
        batch_size=batch,
        batch_format="numpy",
        num_cpus=WORKER_CPUS,
        num_gpus=1 if gpu else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    with reraise_user_errors():
        results = iter(answered.iter_rows())
        # When this process ends, Ray would print an error, that it could not restart the pool's actors.
        with without_stderr():
            first = next(results, None)
        for row in [] if first is None else chain([first], results):
            yield pickle.loads(row["row"]), pickle.loads(row["result"])
