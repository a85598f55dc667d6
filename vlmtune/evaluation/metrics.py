"""Metrics of generated answers, with bootstrap confidence intervals.

Every metric is a ratio of two sums over rows, a numerator and a denominator, to which a function may be
applied. Each row adds two numbers to each metric. From these sums come the value, its interval, and the
interval of the difference between two models on the same rows.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from vlmtune.errors import ConfigError, nearest
from vlmtune.evaluation.grounding import iou, point_in_box
from vlmtune.evaluation.numbers import first_number
from vlmtune.evaluation.text import normalize, words

RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50  # in memory together; each takes 8 bytes for each group
CONFIDENCE = 0.95
ANLS_THRESHOLD = 0.5
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class AnsweredRow:
    """One row with a model's answer to it.

    Attributes:
        answer: what the model generated.
        reference: the answer in the data.
        nll: summed negative log-likelihood of the reference's `tokens` tokens; 0 if it was not computed.
        tokens: number of labelled tokens; 0 if `nll` was not computed.
    """

    answer: str
    reference: str
    nll: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """How a metric is computed.

    Attributes:
        mode: whether lower ("min") or higher ("max") is better.
        parts: (numerator, denominator) that a row adds; (0, 0) for a row that does not count.
        finish: function that is applied to the ratio of the sums.
        share: whether the metric is a mean of values from 0 to 1, shown in per cent.
    """

    mode: Literal["min", "max"]
    parts: Callable[[AnsweredRow], tuple[float, float]]
    finish: Callable[[float], float] = float
    share: bool = False


def exact_match(answer: str, reference: str) -> float:
    """1 if the texts are equal, ignoring white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def normalized_match(answer: str, reference: str) -> float:
    """1 if the texts are equal after `text.normalize`, else 0."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words without English articles, as in SQuAD (Rajpurkar et al. 2016)."""
    answered, expected = (
        [word for word in words(text) if word not in ARTICLES] for text in (answer, reference)
    )
    return _f1(sum((Counter(answered) & Counter(expected)).values()), len(answered), len(expected))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    Lin 2004, section 3, with beta 1 as in the rouge-score package.
    """
    answered, expected = words(answer), words(reference)
    return _f1(LCSseq.similarity(answered, expected), len(answered), len(expected))


def anls(answer: str, reference: str) -> float:
    """1 minus the normalized edit distance; 0 if that distance is 0.5 or more (Biten et al. 2019).

    The distance counts characters in Unicode form NFC, where a Hangul syllable is one character. Case and the
    amount of white space are ignored.
    """
    answered, expected = (
        " ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in (answer, reference)
    )
    distance = Levenshtein.normalized_distance(answered, expected)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _f1(common: int, answered: int, expected: int) -> float:
    if not answered or not expected:
        return float(answered == expected)
    return 2 * common / (answered + expected)


def _mean(score: Callable[[str, str], float]) -> Callable[[AnsweredRow], tuple[float, float]]:
    return lambda row: (score(row.answer, row.reference), 1.0)


def _of_numbers(
    score: Callable[[float | None, float], float],
) -> Callable[[AnsweredRow], tuple[float, float]]:
    """Compare the numbers in answer and reference; rows whose reference has no number do not count.

    `score` gets None if the answer has no number.
    """

    def parts(row: AnsweredRow) -> tuple[float, float]:
        expected = first_number(row.reference)
        return (0.0, 0.0) if expected is None else (score(first_number(row.answer), expected), 1.0)

    return parts


def _of_places(
    score: Callable[[str, str], float | None],
) -> Callable[[AnsweredRow], tuple[float, float]]:
    """Compare boxes and points; rows whose reference has no box do not count."""

    def parts(row: AnsweredRow) -> tuple[float, float]:
        value = score(row.answer, row.reference)
        return (0.0, 0.0) if value is None else (value, 1.0)

    return parts


METRICS: dict[str, Metric] = {
    "exact_match": Metric("max", _mean(exact_match), share=True),
    "normalized_match": Metric("max", _mean(normalized_match), share=True),
    # An answer without a number counts as 0. If it were left out, a model that answers nothing would be best.
    # `number_rate` is the share of answers that have a number.
    "mae": Metric("min", _of_numbers(lambda answered, expected: abs((answered or 0.0) - expected))),
    "rmse": Metric(
        "min", _of_numbers(lambda answered, expected: ((answered or 0.0) - expected) ** 2), math.sqrt
    ),
    "within_1": Metric(
        "max",
        _of_numbers(lambda answered, expected: float(answered is not None and abs(answered - expected) <= 1)),
        share=True,
    ),
    "number_rate": Metric(
        "max", _of_numbers(lambda answered, expected: float(answered is not None)), share=True
    ),
    "token_f1": Metric("max", _mean(token_f1), share=True),
    "rouge_l": Metric("max", _mean(rouge_l), share=True),
    "anls": Metric("max", _mean(anls), share=True),
    "iou": Metric("max", _of_places(iou), share=True),
    "point_in_box": Metric("max", _of_places(point_in_box), share=True),
    # Over all labelled tokens of all rows: the exponential of eval_loss.
    "perplexity": Metric(
        "min", lambda row: (row.nll, float(row.tokens)), lambda loss: math.exp(min(loss, 700.0))
    ),
}

# Metrics that need generated answers. Perplexity needs none: it is the exponential of eval_loss.
ANSWER_METRICS = tuple(name for name in METRICS if name != "perplexity")


def with_number_rate(names: Sequence[str]) -> list[str]:
    """The metrics, and `number_rate` if one of them counts an answer without a number as 0."""
    more = ["number_rate"] if {"mae", "rmse"} & set(names) else []
    return list(dict.fromkeys([*names, *more]))


def check_metrics(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"{name}: there is no such metric; there are {', '.join(METRICS)}{nearest(name, METRICS)}"
            )


def score(answers: Sequence[str], references: Sequence[str], name: str) -> float:
    """Compute one metric of `answers`; NaN if no row counts, as when no reference has a number."""
    rows = [AnsweredRow(*pair) for pair in zip(answers, references, strict=True)]
    return _value(name, *parts_of(rows, [name]).sum(axis=0))


@dataclass(frozen=True)
class MetricEstimate:
    """A metric's value and its 95 % confidence interval.

    `low` and `high` are None if there is only one group of rows, which cannot be resampled.
    """

    value: float
    low: float | None
    high: float | None


def estimates(
    models: Sequence[Sequence[AnsweredRow]],
    groups: Sequence[str],
    names: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[dict[str, MetricEstimate]]:
    """Compute the metrics of each model on the same rows, with 95 % confidence intervals.

    Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13). Whole groups are
    drawn, because two questions about one image are not two independent rows. The same groups are drawn for
    all models, so that a difference between two models is paired.

    Args:
        models: the answered rows of each model; the same rows in the same order.
        groups: the group of each row, such as its image.
        names: the metrics, keys of METRICS.

    Returns:
        The estimates by metric for each model. With two models, a third entry holds their difference (first
        minus second). A metric in which no row counts is left out.
    """
    parts = np.concatenate([parts_of(rows, names) for rows in models], axis=1)
    drawn = np.array([*resampled(parts, groups, seed=seed, resamples=resamples)])
    width = 2 * len(names)
    result: list[dict[str, MetricEstimate]] = [{} for _ in range(3 if len(models) == 2 else len(models))]
    for place, name in enumerate(names):
        columns = [
            slice(width * model + 2 * place, width * model + 2 * place + 2) for model in range(len(models))
        ]
        values = [_value(name, *parts[:, column].sum(axis=0)) for column in columns]
        samples = [np.array([_value(name, *sums) for sums in drawn[:, column]]) for column in columns]
        if len(models) == 2:
            values, samples = [*values, values[0] - values[1]], [*samples, samples[0] - samples[1]]
        for entry, value, sample in zip(result, values, samples, strict=True):
            if not math.isnan(value):
                entry[name] = MetricEstimate(value, *_interval(sample, len(set(groups))))
    return result


def parts_of(rows: Sequence[AnsweredRow], names: Sequence[str]) -> np.ndarray:
    """Numerator and denominator of each row for each metric; shape `[N, 2 x metrics]`, float64."""
    return np.array(
        [[part for name in names for part in METRICS[name].parts(row)] for row in rows], dtype=float
    ).reshape(len(rows), -1)


def resampled(parts: np.ndarray, groups: Sequence[str], *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Draw the groups with replacement, `resamples` times. Yields the column sums of `parts` `[N, K]`."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1
    sums = np.zeros((count, parts.shape[1]))
    np.add.at(sums, member, parts)
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        yield from (
            generator.multinomial(
                count, np.full(count, 1 / count), size=min(RESAMPLES_AT_ONCE, resamples - start)
            )
            @ sums
        )


def _value(name: str, numerator: float, denominator: float) -> float:
    return METRICS[name].finish(numerator / denominator) if denominator else math.nan


def _interval(sample: np.ndarray, groups: int) -> tuple[float | None, float | None]:
    known = sample[~np.isnan(sample)]  # a draw may have no row that counts
    if groups < 2 or not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
