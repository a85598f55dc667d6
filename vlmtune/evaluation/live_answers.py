"""Answers to a few fixed evaluation rows at evaluations, for the page of a search."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.store import Store
from vlmtune.errors import ModelError
from vlmtune.evaluation.generate import ReadExamples, answers, question, reference
from vlmtune.evaluation.objective import sampled_rows
from vlmtune.library_errors import first_line, lacks_memory

logger = logging.getLogger(__name__)

MAX_SHARE_OF_TIME = 0.02  # of the time of an engine or an isolated trial
MAX_NEW_TOKENS = 32
MAX_CHARACTERS = 200  # of a question or answer

Answered = list[dict[str, str]]  # for each row its question, reference and answer


@dataclass
class LiveAnswers:
    """Answers the same rows at evaluations, in at most MAX_SHARE_OF_TIME of the time since it was made.

    An evaluation that comes too early gets no answers. Only how long the first ones take is not known before.

    Attributes:
        rows: the number of rows.
        max_new_tokens: the longest answer in tokens.
        seed: seed of the sample of evaluation rows whose first rows are answered.
        seconds: time spent so far.
        last_seconds: time that the last answers took; the next ones are expected to take as long.
        possible: False after the GPU had no memory for them, or the model's class could not generate. The
            memory of captured steps is not freed for them.
    """

    rows: int
    max_new_tokens: int
    seed: int
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    last_seconds: float = 0.0
    possible: bool = True

    @classmethod
    def of(cls, settings: Settings) -> LiveAnswers | None:
        """For the trials of these settings; None without a search or with `live_answers` 0."""
        search = settings.search
        if search.search_space is None or search.live_answers == 0:
            return None
        new_tokens = min(MAX_NEW_TOKENS, search.max_new_tokens)
        return cls(search.live_answers, new_tokens, settings.data.split_seed)

    @property
    def due(self) -> bool:
        """Whether further answers would keep to the share of the time."""
        allowed = MAX_SHARE_OF_TIME * (time.monotonic() - self.started)
        return self.possible and (not self.seconds or self.seconds + self.last_seconds <= allowed)

    def generate(self, model: Any, processor: Any, store: Store, read: ReadExamples) -> Answered:
        """Generate answers with a model in evaluation mode; empty if that is not possible."""
        started = time.monotonic()
        rows = self._rows_of(store)
        try:
            texts = answers(
                model,
                processor,
                store,
                rows,
                max_new_tokens=self.max_new_tokens,
                batch_size=len(rows),
                read=read,
                may_free_graphs=False,
            )
        except (RuntimeError, ModelError) as error:
            if not (isinstance(error, ModelError) or lacks_memory(error)):
                raise
            self.possible = False
            logger.info(console_line("Page", f"no answers to fixed rows are shown: {first_line(error)}"))
            return []
        answered = self.reuse(processor, store, read, dict(zip(rows, texts, strict=True)))
        self.last_seconds = time.monotonic() - started
        self.seconds += self.last_seconds
        return answered

    def reuse(self, processor: Any, store: Store, read: ReadExamples, texts: Mapping[int, str]) -> Answered:
        """Those of the rows that were answered anyway.

        Args:
            texts: answers by row number.
        """
        rows = [row for row in self._rows_of(store) if row in texts]
        tokenizer = processor.tokenizer
        return [
            {
                "question": shortened(question(tokenizer, example)),
                "reference": shortened(reference(tokenizer, example)),
                "answer": shortened(texts[row]),
            }
            for row, example in zip(rows, read(store, rows), strict=True)
        ]

    def _rows_of(self, store: Store) -> list[int]:
        return [int(row) for row in sampled_rows(store, self.seed)[: self.rows]]


def shortened(text: str) -> str:
    """A text of at most MAX_CHARACTERS."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
