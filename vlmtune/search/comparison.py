"""What the search was worth: the base, the baseline, the recipe and the best adapter answer test rows.

No trial trained on test rows, and the search did not choose by them.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from ray.exceptions import RayError

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import TEST
from vlmtune.data.store import Store
from vlmtune.errors import UserError
from vlmtune.evaluation.actors import BASE, AnswerJob
from vlmtune.evaluation.adapter import read_adapter_files
from vlmtune.evaluation.answer_kinds import answer_kind
from vlmtune.evaluation.evaluate import answer_store_rows
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.evaluation.metrics import METRICS, AnsweredRow, MetricEstimate, estimates, with_number_rate
from vlmtune.evaluation.options import DEFAULT_NEW_TOKENS
from vlmtune.evaluation.verdict import few_rows_warning, verdict_text
from vlmtune.image_resolution import ImageResolution
from vlmtune.search.trial_results import failure_reason

logger = logging.getLogger(__name__)

MAX_ROWS = 500  # with 500 rows, the 95 % interval of a percentage is at most 9 points wide
BEST = "best"
RECIPE = "recipe"
BASELINE = "own"  # the baseline's key in metrics.json, by an older name: the values of the config itself
MODEL_NAMES = {BASE: "the base", BASELINE: "the baseline", RECIPE: "the recipe"}
METRICS_OF_KIND = {"count": ("mae", "within_1"), "number": ("mae",), "text": ("token_f1",)}
NO_TEST_ROWS = "the data has no test rows that a comparison with the base could use (--test_fraction)"


@dataclass(frozen=True)
class ComparedRow:
    """One test row of the store with each model's answer, by BEST, BASELINE, RECIPE and BASE.

    Attributes:
        source: where a person finds the row, such as `data.jsonl:3`.
        group: its group; all rows of a group are in the same split.
        images: the file names of its images.
    """

    row: int
    question: str
    reference: str
    answers: dict[str, str]
    source: str = ""
    group: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoComparison:
    """Why the models were not compared."""

    reason: str


@dataclass(frozen=True)
class Comparison:
    """The models compared on the same test rows.

    Attributes:
        rows: the answered rows.
        total: number of test rows, of which `rows` may be a sample.
        metrics: the metrics, the most important one first.
        models: the metrics of each model, by BEST, BASELINE, RECIPE and BASE.
        gains: the best adapter's metrics minus those of each other model.
        counts: whether the answers are counts, whose error reads "off by 2".
    """

    rows: list[ComparedRow]
    total: int
    metrics: list[str]
    models: dict[str, dict[str, MetricEstimate]]
    gains: dict[str, dict[str, MetricEstimate]]
    counts: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The numbers as metrics.json holds them."""

        def plain(by_model: Mapping[str, Mapping[str, MetricEstimate]]) -> dict[str, Any]:
            return {
                model: {name: asdict(estimate) for name, estimate in metrics.items()}
                for model, metrics in by_model.items()
            }

        return {
            "rows": len(self.rows),
            "of": self.total,
            "models": plain(self.models),
            "best_minus": plain(self.gains),
        }

    def model_card_rows(self) -> dict[str, str]:
        """The numbers as rows of the model card's table: name and value."""
        base, name = self.models[BASE], self.metrics[0]
        values = {
            f"{name.replace('_', ' ')}, {len(self.rows)} test rows": (
                f"{format_metric(name, best.value)} (base: {format_metric(name, base[name].value)})"
            )
            for name, best in self.models[BEST].items()
        }
        verdict = verdict_text(name, self.gains[BASE][name], len(self.rows))
        return {**values, f"against the base, by {name.replace('_', ' ')}": f"{verdict}, a 95 % interval"}

    def summary_line(self) -> str:
        """The first two metrics, before and after, in one line."""
        rows_text = (
            f"{len(self.rows)} of the {self.total}" if len(self.rows) < self.total else f"{self.total}"
        )
        changes = [self._change(self.metrics[0], with_others=True)]
        if second := next((name for name in self.metrics[1:] if name in self.models[BEST]), None):
            changes.append(self._change(second, with_others=False))
        return f"{rows_text} rows that no trial saw: {'; '.join(changes)}"

    def verdict_lines(self) -> list[str]:
        """Compare the best adapter with each other model, with intervals, and warn if there are few rows.

        `against the base: better (+83.8 points, +78.1 to +88.5, 192 rows)`
        """
        name, rows = self.metrics[0], len(self.rows)
        lines = [
            f"against {MODEL_NAMES[other]}: {verdict_text(name, self.gains[other][name], rows)}"
            for other in MODEL_NAMES
            if other in self.gains
        ]
        warning = few_rows_warning(rows)
        return [*lines, *([warning] if warning else [])]

    def _change(self, name: str, *, with_others: bool) -> str:
        before, after = (format_metric(name, self.models[model][name].value) for model in (BASE, BEST))
        others_text = ""
        if with_others:
            words = ((BASELINE, "baseline"), (RECIPE, "recipe"))
            others = [(word, self.models.get(model)) for model, word in words]
            texts = [
                f"{word}: {format_metric(name, metrics[name].value)}" for word, metrics in others if metrics
            ]
            others_text = f" ({', '.join(texts)})" if texts else ""
        if name == "mae":
            others_text = f"{self._without_number()}{others_text}"
        if name == "mae" and self.counts:
            return f"off by {before} → {after} on average{others_text}"
        return f"{name.replace('_', ' ')} {before} → {after}{others_text}"

    def _without_number(self) -> str:
        """The shares of answers without a number, before and after, if there are any."""
        before, after = (1 - self.models[model]["number_rate"].value for model in (BASE, BEST))
        if before == after == 0:
            return ""
        shares = f"{100 * before:.1f} % → {100 * after:.1f} %"
        return f" ({shares} of the answers have no number and count as 0)"


def format_metric(name: str, value: float) -> str:
    """A metric's value: a share in per cent, another number with two digits."""
    return f"{100 * value:.1f} %" if METRICS[name].share else f"{value:.2g}"


def compare(
    settings: Settings,
    store: Store,
    cluster: Cluster,
    best: str,
    others: Mapping[str, str],
    resolutions: Mapping[str, ImageResolution] | None = None,
) -> Comparison | NoComparison:
    """Answer test rows with the base, the best adapter and other ones, and compare the answers.

    Each adapter gets the images at the resolution that it was trained at, the base at that of the best.
    Nothing is raised if a model cannot answer: the search has its result already.

    Args:
        settings: settings of the best trial.
        best: folder or URI of the best adapter.
        others: folder or URI of the adapters of BASELINE and RECIPE, for those whose trial completed and is
            not the best one.
        resolutions: the resolutions of these adapters' images, if the search varies them.
    """
    test_rows = store.rows_of(TEST)
    if not len(test_rows):
        return NoComparison(NO_TEST_ROWS)
    seed = settings.data.split_seed
    rows = sample_rows(test_rows, seed)
    text = f"{len(rows)} of {len(test_rows)} rows that no trial saw are answered"
    logger.info(console_line("Test", f"{text}, by the base and by the adapters"))
    try:
        compared = _answer(settings, store, cluster, rows, {BEST: best, **others}, resolutions or {})
    except (UserError, RayError) as error:
        return NoComparison(f"the test rows could not be answered: {failure_reason(str(error))}")
    groups = [str(group) for group in store.column("group")[rows]]
    sources = [str(source) for source in store.column("source")[rows]]
    compared = [
        replace(row, source=source, group=group)
        for row, source, group in zip(compared, sources, groups, strict=True)
    ]
    return compare_answers(compared, groups, len(test_rows), seed)


def sample_rows(test_rows: np.ndarray, seed: int) -> np.ndarray:
    """At most MAX_ROWS of the test rows, in order. The same rows and seed give the same sample."""
    if len(test_rows) <= MAX_ROWS:
        return test_rows
    return np.sort(np.random.default_rng(seed).choice(test_rows, MAX_ROWS, replace=False))


def _answer(
    settings: Settings,
    store: Store,
    cluster: Cluster,
    rows: np.ndarray,
    folders: Mapping[str, str],
    resolutions: Mapping[str, ImageResolution],
) -> list[ComparedRow]:
    own = settings.model.resolution
    models_at: dict[ImageResolution, list[str]] = defaultdict(list)
    for name in (*folders, BASE):
        models_at[resolutions.get(name, own)].append(name)
    answers: list[dict[str, str]] = [{} for _ in rows]
    texts: list[tuple[str, str]] = []
    for resolution, models in models_at.items():
        adapters = {name: read_adapter_files(folders[name]) for name in models if name != BASE}
        at_resolution = store.at(resolution)
        job = AnswerJob(
            settings.replace(**vars(resolution)),
            adapters,
            tuple(models),
            BatchBuilder.of(at_resolution),
            answer_limit(store, rows),
            likelihoods=False,
        )
        results = answer_store_rows(job, at_resolution, rows, cluster)
        texts = [(result["question"], result["reference"]) for result in results]
        for answered, result in zip(answers, results, strict=True):
            answered |= {model: result[model]["answer"] for model in models}
    return [
        ComparedRow(int(row), *pair, answered)
        for row, pair, answered in zip(rows, texts, answers, strict=True)
    ]


def answer_limit(store: Store, rows: np.ndarray) -> int:
    """The longest answer in tokens that a model may give to these rows.

    One and a half times the longest reference among them, because a longer answer is wrong anyway, but no
    less than DEFAULT_NEW_TOKENS.
    """
    longest = int(store.column("answer_tokens")[rows].max())
    return max(DEFAULT_NEW_TOKENS, longest + longest // 2)


def compare_answers(rows: Sequence[ComparedRow], groups: Sequence[str], total: int, seed: int) -> Comparison:
    """Compute the metrics of each model and the differences.

    Numbers are compared by their error, other answers by the words that they share with the reference.

    Args:
        groups: the group of each row, such as its image.
        total: number of test rows, of which `rows` may be a sample.
    """
    kind = answer_kind([row.reference for row in rows])
    metrics = with_number_rate(["exact_match", *METRICS_OF_KIND[kind]])
    by_model = {
        model: [AnsweredRow(row.answers[model], row.reference) for row in rows]
        for model in (BEST, BASELINE, RECIPE, BASE)
        if model in rows[0].answers
    }
    models, gains = {}, {}
    for other in (BASELINE, RECIPE, BASE):
        # Two models at a time: `estimates` gives intervals of them and of the difference between them, for
        # which it draws the same groups of rows for both.
        if other in by_model:
            models[BEST], models[other], gains[other] = estimates(
                [by_model[BEST], by_model[other]], groups, metrics, seed=seed
            )
    return Comparison(list(rows), total, metrics, models, gains, counts=kind == "count")


def worst_first(rows: Sequence[ComparedRow], metrics: Sequence[str], seed: int) -> list[ComparedRow]:
    """Sort the rows by the error of the best adapter's answer, the largest first.

    Rows with equal errors are in random order, because neighboring rows are much alike.
    """

    def sort_key(row: ComparedRow) -> tuple[float, float]:
        answer = AnsweredRow(row.answers[BEST], row.reference)
        metric = METRICS["mae" if "mae" in metrics else "token_f1"]
        # The numerator alone: a row's absolute error, or its F1.
        error = metric.parts(answer)[0] * (1 if metric.mode == "min" else -1)
        return (METRICS["exact_match"].parts(answer)[0], -error)

    order = np.random.default_rng(seed).permutation(len(rows))
    return sorted((rows[index] for index in order), key=sort_key)
