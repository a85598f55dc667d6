"""A metric of generated answers as what a search is for: on a sample of the evaluation rows at each rung, on
all at a trial's end."""

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
from vlmtune.evaluation.generate import Read, answers, reference
from vlmtune.evaluation.metrics import METRICS, score

# Metrics of answers. Perplexity needs none: it is the exponential of eval_loss.
OBJECTIVES = tuple(name for name in METRICS if name != "perplexity")


@dataclass(frozen=True)
class Objective:
    """What is measured, on how many rows before the end, with how long answers, and the seed of the
    sample."""

    name: str
    rows: int
    max_new_tokens: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, settings: Settings) -> Objective | None:
        """The objective of the settings where it is a metric of answers."""
        search = settings.search
        if search.metric not in OBJECTIVES:
            return None
        return cls(
            search.metric,
            search.metric_rows,
            search.max_new_tokens,
            settings.training.per_device_eval_batch_size,
            settings.training.seed,
        )

    def measure(
        self,
        model: Any,
        processor: Any,
        store: Store,
        read: Read,
        *,
        last: bool,
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, float]:
        """The metric of the model's answers, by its name; every rank answers a part of the rows, and all
        know the result.

        Args:
            last: of a trial's steps: all evaluation rows are answered then.
        """
        rows = np.asarray(store.rows_of(EVAL))
        if not last:  # the same rows for every trial
            rows = rows[np.random.RandomState(self.seed % 2**32).permutation(len(rows))[: self.rows]]
        mine: Sequence[int] = [int(row) for row in rows[rank::world]]
        found = answers(
            model,
            processor,
            store,
            mine,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            read=read,
        )
        wanted = [reference(processor.tokenizer, example) for example in read(store, mine)]
        pairs: list[Any] = [(found, wanted)]
        if world > 1:
            pairs = [None] * world
            dist.all_gather_object(pairs, (found, wanted))
        texts, references = ([text for pair in pairs for text in pair[side]] for side in (0, 1))
        return {self.name: score(texts, references, self.name)}


def cached(examples: dict[int, EncodedExample]) -> Read:
    """A `Read` of examples that are in memory already."""
    return lambda _, rows: [examples[row] for row in rows]
