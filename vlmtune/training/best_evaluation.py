"""Decide which evaluation of a run counts: the best one with `load_best_model_at_end`, else the last one.

Both runners decide by the log history of the trainer state, which checkpoints contain. So a resumed run
decides like a run that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.evaluation.metrics import METRICS

# Keys of a report.
BEST_STEP = "best_step"  # the step of the evaluation whose numbers the report has, if the best one counts
LAST = "last_"  # prefix for the numbers of the report's own evaluation, if the best one counts
LAST_CHECKPOINT = "last_checkpoint_path"  # folder or URI of the checkpoint after the last step
LIVE_ANSWERS = "live_answers"  # answers to a few fixed rows, see `evaluation.live_answers`; not a metric
OUT_OF_PATIENCE = "out_of_patience"  # the run has ended by `early_stopping_patience`


def ran_to_its_end(report: Mapping[str, Any]) -> bool:
    """Whether a run has ended with this report: by its last step, or by `early_stopping_patience`."""
    return bool(report["step"] >= report["max_steps"] or report.get(OUT_OF_PATIENCE))


@dataclass(frozen=True)
class EvaluationRule:
    """How the evaluations of a run are compared.

    Attributes:
        metric: the number that is compared; `mode` says whether "min" or "max" is better.
        load_best: whether the best evaluation counts instead of the last.
        patience: the number of evaluations in a row without an improvement after which the run ends; None for
            no such limit.
        threshold: an improvement smaller than this does not count.
    """

    metric: str
    mode: str
    load_best: bool
    patience: int | None
    threshold: float

    @classmethod
    def of(cls, settings: Settings, evaluation_rows: int) -> EvaluationRule:
        """The rule of a run's settings.

        Before the run's last evaluation, a metric of answers is measured on `metric_rows` rows only. If these
        are not all evaluation rows, the values are not comparable, and the last evaluation counts.
        """
        search, training = settings.search, settings.training
        answers = search.metric in METRICS and search.metric != "perplexity"
        sampled = answers and search.metric_rows < evaluation_rows
        metric, mode = (search.metric, search.mode) if answers and not sampled else ("eval_loss", "min")
        return cls(
            metric,
            mode,
            bool(training.load_best_model_at_end) and not sampled,
            training.early_stopping_patience,
            training.early_stopping_threshold,
        )

    def judged(
        self, report: Mapping[str, Any], names: Iterable[str], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The report to send: `report`, or with `load_best` the numbers of the best evaluation so far.

        In the latter case the report has the best evaluation's numbers, its step under `best_step`, and its
        own numbers under `last_`. If its metric is NaN or infinite, the report keeps its own numbers.

        Args:
            names: the names of the numbers of an evaluation.
            history: the log history of the trainer state, this evaluation included.
        """
        counted = dict(report)
        if self.out_of_patience(history):
            counted[OUT_OF_PATIENCE] = True
        if not self.load_best:
            return counted
        # Also if it is NaN, because Ray Train ranks a checkpoint without this number as the best.
        counted |= {f"{LAST}{name}": report[name] for name in names}
        if not math.isfinite(report[self.metric]):
            return counted
        best = self._best(history)
        counted |= {name: best[name] for name in names}
        return {**counted, BEST_STEP: best["step"]}

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the run ends by `patience`, decided as transformers' EarlyStoppingCallback does."""
        if self.patience is None:
            return False
        best, waited = None, 0
        for value in (entry[self.metric] for entry in self._evaluations(history)):
            better = best is None or (value < best if self.mode == "min" else value > best)
            gained = better and (best is None or abs(value - best) > self.threshold)
            waited = 0 if gained else waited + 1
            best = value if better else best
        return waited >= self.patience

    def _best(self, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        sign = 1 if self.mode == "min" else -1
        finite = [entry for entry in self._evaluations(history) if math.isfinite(entry[self.metric])]
        # Of equally good ones the last, because Ray Train keeps its checkpoint.
        return min(reversed(finite), key=lambda entry: sign * float(entry[self.metric]))

    def _evaluations(self, history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [entry for entry in history if self.metric in entry]
