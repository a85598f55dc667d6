"""A metric of generated answers as a search objective.

It is measured on a sample of the evaluation rows at each evaluation, and on all of them at a trial's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from vlmtune.config.settings import Settings
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import ReadExamples, answers, reference
from vlmtune.evaluation.metrics import ANSWER_METRICS, score, with_number_rate


@dataclass(frozen=True)
class ScoredAnswers:
    """Answers to evaluation rows and what they are worth.

    Attributes:
        metrics: {name: value} of the metric, and of number_rate if it is mae or rmse.
        texts: the answers by row number.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)


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
    ) -> ScoredAnswers:
        """Answer evaluation rows, and score them.

        Each rank answers every `world_size`-th row. All ranks return the same result.

        Args:
            last: whether this is the trial's last step, at which all evaluation rows are answered.
        """
        rows = np.asarray(store.rows_of(EVAL))
        if not last:  # a sample, the same one for every trial
            rows = sampled_rows(store, self.seed)[: self.rows]
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
            dist.all_gather_object(gathered, (own_rows, texts, references))
            own_rows, texts, references = ([one for part in gathered for one in part[i]] for i in range(3))
        metrics = {name: score(texts, references, name) for name in with_number_rate([self.name])}
        return ScoredAnswers(metrics, dict(zip(own_rows, texts, strict=True)))


def sampled_rows(store: Store, seed: int) -> np.ndarray:
    """All evaluation rows in the order in which samples take them; shape `[n]`."""
    rows = store.rows_of(EVAL)
    return rows[np.random.RandomState(seed % 2**32).permutation(len(rows))]
