"""Which evaluation of a run counts: its best one with `load_best_model_at_end`, else its last.

Both runners use this on the log history of the trainer's state, which checkpoints hold. So a resumed run
judges as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.evaluation.metrics import METRICS

# Keys of a report.
BEST_STEP = "best_step"  # the step of the evaluation whose numbers the report has
LAST = "last_"  # before the name of a number of the last evaluation, where another one counts
LAST_CHECKPOINT = "last_checkpoint_path"  # folder or URI of the checkpoint after the last step
OUT_OF_PATIENCE = "out_of_patience"  # the run has ended by `early_stopping_patience`


def has_ended(report: Mapping[str, Any]) -> bool:
    """Whether a run had ended with this report: all its steps were made, or its patience was over."""
    return bool(report["step"] >= report["max_steps"] or report.get(OUT_OF_PATIENCE))


@dataclass(frozen=True)
class EvaluationRule:
    """How the evaluations of a run are compared.

    Attributes:
        metric: the number that is compared; `mode` says whether "min" or "max" is better.
        load_best: whether the best evaluation counts, not the last.
        patience: evaluations in a row without a gain after which the run ends; None: it never does.
        threshold: a smaller gain than this is none.
    """

    metric: str
    mode: str
    load_best: bool
    patience: int | None
    threshold: float

    @classmethod
    def of(cls, settings: Settings, evaluation_rows: int) -> EvaluationRule:
        """The rule of a run's settings.

        A metric of answers is measured on a sample of `metric_rows` rows before the run's end. If that is
        not the whole evaluation set, its values are not comparable, and the last evaluation counts.
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
        """A report as it counts.

        With `load_best` it has the numbers `names` of the best evaluation so far and its `best_step`, and its
        own under `last_`. One whose metric is NaN or infinite keeps its numbers.

        Args:
            names: the numbers of an evaluation.
            history: the log history of the trainer's state, this evaluation included.
        """
        counted = dict(report)
        if self.out_of_patience(history):
            counted[OUT_OF_PATIENCE] = True
        if not self.load_best:
            return counted
        # Also where it is NaN: Ray Train would take a checkpoint without the number for the best.
        counted |= {f"{LAST}{name}": report[name] for name in names}
        if not math.isfinite(report[self.metric]):
            return counted
        best = self._best(history)
        counted |= {name: best[name] for name in names}
        return {**counted, BEST_STEP: best["step"]}

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the run ends, counted as transformers' EarlyStoppingCallback does."""
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
        # The last of equal ones, as Ray Train keeps checkpoints.
        return min(reversed(finite), key=lambda entry: sign * float(entry[self.metric]))

    def _evaluations(self, history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [entry for entry in history if self.metric in entry]
