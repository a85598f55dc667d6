"""A metric of generated answers as a search objective.

It is measured on a sample of the evaluation rows at each evaluation, and on all of them at a trial's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import ReadExamples, answers, reference
from vlmtune.evaluation.metrics import ANSWER_METRICS, score, with_number_rate


@dataclass(frozen=True)
class Objective:
    """A metric of generated answers, and how it is measured.

    Attributes:
        name: a key of `metrics.METRICS`.
        rows: size of the sample of evaluation rows before the last step.
        max_new_tokens: the longest answer in tokens.
        batch_size: rows that are answered together.
        seed: seed of the sample.
    """

    name: str
    rows: int
    max_new_tokens: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, settings: Settings) -> Objective | None:
        """The objective of these settings if it is a metric of answers, else None."""
        search = settings.search
        if search.metric not in ANSWER_METRICS:
            return None
        return cls(
            search.metric,
            search.metric_rows,
            search.max_new_tokens,
            settings.training.per_device_eval_batch_size,
            settings.data.split_seed,
        )

    def measure(
        self,
        model: Any,
        processor: Any,
        store: Store,
        read: ReadExamples,
        *,
        last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> dict[str, float]:
        """Answer evaluation rows.

        Returns {name: value} of the metric, and of number_rate if it is mae or rmse.

        Each rank answers every `world_size`-th row. All ranks return the same result.

        Args:
            last: whether this is the trial's last step, at which all evaluation rows are answered.
        """
        rows = np.asarray(store.rows_of(EVAL))
        if not last:  # a sample, the same one for every trial
            rows = rows[np.random.RandomState(self.seed % 2**32).permutation(len(rows))[: self.rows]]
        own_rows: Sequence[int] = [int(row) for row in rows[rank::world_size]]
        texts = answers(
            model,
            processor,
            store,
            own_rows,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            read=read,
        )
        references = [reference(processor.tokenizer, example) for example in read(store, own_rows)]
        if world_size > 1:
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, (texts, references))
            texts, references = ([text for pair in gathered for text in pair[side]] for side in (0, 1))
        return {name: score(texts, references, name) for name in with_number_rate([self.name])}


def read_from_memory(examples: dict[int, EncodedExample]) -> ReadExamples:
    """A `ReadExamples` function over examples that are in memory, by row number."""
    return lambda _, rows: [examples[row] for row in rows]
