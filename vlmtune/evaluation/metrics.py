"""What answers are worth: one table of metrics, and intervals by resampling.

Every metric is a sum over rows divided by another one, perhaps with a function of the quotient. So a row has
two numbers for each metric,
and the same sums make the value, its interval, and the interval of a difference between two models on the
same rows.
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
from vlmtune.evaluation.numbers import number
from vlmtune.evaluation.text import normalize, words

RESAMPLES = 1000
AT_ONCE = 50  # resamples in memory: 50 x groups numbers of 8 bytes
CONFIDENCE = 0.95
ANLS_THRESHOLD = 0.5
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Row:
    """One answered row. `nll`: the summed negative log-likelihood of the reference's `tokens` tokens, where
    it was asked for."""

    answer: str
    reference: str
    nll: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """`parts` of a row are what it adds to numerator and denominator: (0, 0) where it has no say. `share`: a
    mean of values from 0 to 1."""

    mode: Literal["min", "max"]
    parts: Callable[[Row], tuple[float, float]]
    finish: Callable[[float], float] = float
    share: bool = False


def exact_match(answer: str, reference: str) -> float:
    """1 where the texts are equal, white space around them apart."""
    return float(answer.strip() == reference.strip())


def normalized_match(answer: str, reference: str) -> float:
    """1 where the texts are equal after `text.normalize`."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, English articles left out, as in SQuAD (Rajpurkar
    et al. 2016)."""
    found, wanted = ([word for word in words(text) if word not in ARTICLES] for text in (answer, reference))
    return _f1(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3, with beta 1 as in the rouge-score
    package)."""
    found, wanted = words(answer), words(reference)
    return _f1(LCSseq.similarity(found, wanted), len(found), len(wanted))


def anls(answer: str, reference: str) -> float:
    """1 minus the edit distance over the longer length, 0 where that distance is half or more (Biten et al.
    2019).

    Of whole characters (NFC: a Hangul syllable is one); case and the amount of white space do not count.
    """
    found, wanted = (
        " ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in (answer, reference)
    )
    distance = Levenshtein.normalized_distance(found, wanted)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _f1(common: int, found: int, wanted: int) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * common / (found + wanted)


def _mean(score: Callable[[str, str], float]) -> Callable[[Row], tuple[float, float]]:
    return lambda row: (score(row.answer, row.reference), 1.0)


def _of_numbers(score: Callable[[float | None, float], float]) -> Callable[[Row], tuple[float, float]]:
    """For rows whose reference tells a number. What the answer tells is None where it tells none."""

    def parts(row: Row) -> tuple[float, float]:
        wanted = number(row.reference)
        return (0.0, 0.0) if wanted is None else (score(number(row.answer), wanted), 1.0)

    return parts


METRICS: dict[str, Metric] = {
    "exact_match": Metric("max", _mean(exact_match), share=True),
    "normalized_match": Metric("max", _mean(normalized_match), share=True),
    # An answer without a number counts as 0: left out, a model that says nothing would be the best.
    # `number_rate` tells how many had one.
    "mae": Metric("min", _of_numbers(lambda found, wanted: abs((found or 0.0) - wanted))),
    "rmse": Metric("min", _of_numbers(lambda found, wanted: ((found or 0.0) - wanted) ** 2), math.sqrt),
    "within_1": Metric(
        "max",
        _of_numbers(lambda found, wanted: float(found is not None and abs(found - wanted) <= 1)),
        share=True,
    ),
    "number_rate": Metric("max", _of_numbers(lambda found, wanted: float(found is not None)), share=True),
    "token_f1": Metric("max", _mean(token_f1), share=True),
    "rouge_l": Metric("max", _mean(rouge_l), share=True),
    "anls": Metric("max", _mean(anls), share=True),
    # Of all labelled tokens, whichever row they are in: the exponential of what training calls eval_loss.
    "perplexity": Metric(
        "min", lambda row: (row.nll, float(row.tokens)), lambda loss: math.exp(min(loss, 700.0))
    ),
}


def check_metrics(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"{name}: there is no such metric; there are {', '.join(METRICS)}{nearest(name, METRICS)}"
            )


def score(answers: Sequence[str], references: Sequence[str], name: str) -> float:
    """One metric of `answers`; NaN where no row has a say, such as `mae` of references without a number."""
    rows = [Row(*pair) for pair in zip(answers, references, strict=True)]
    return _value(name, *parts_of(rows, [name]).sum(axis=0))


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; `low` and `high` are None where the rows are too few to resample."""

    value: float
    low: float | None
    high: float | None


def estimates(
    models: Sequence[Sequence[Row]],
    groups: Sequence[str],
    names: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[dict[str, Estimate]]:
    """The metrics of each model on the same rows; with two models, their difference (first minus second) as
    a third entry.

    Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) at 95 %. Whole
    groups are drawn, because two
    questions about one picture are not two independent rows, and the same groups for all models, so that a
    difference is a paired one.
    Metrics in which no row has a say are left out.

    Args:
        groups: of each row, such as its picture.
    """
    parts = np.concatenate([parts_of(rows, names) for rows in models], axis=1)
    drawn = np.array([*resampled(parts, groups, seed=seed, resamples=resamples)])
    width = 2 * len(names)
    out: list[dict[str, Estimate]] = [{} for _ in range(3 if len(models) == 2 else len(models))]
    for place, name in enumerate(names):
        columns = [
            slice(width * model + 2 * place, width * model + 2 * place + 2) for model in range(len(models))
        ]
        values = [_value(name, *parts[:, column].sum(axis=0)) for column in columns]
        samples = [np.array([_value(name, *sums) for sums in drawn[:, column]]) for column in columns]
        if len(models) == 2:
            values, samples = [*values, values[0] - values[1]], [*samples, samples[0] - samples[1]]
        for entry, value, sample in zip(out, values, samples, strict=True):
            if not math.isnan(value):
                entry[name] = Estimate(value, *_interval(sample, len(set(groups))))
    return out


def parts_of(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """[N, 2 x metrics] float64: numerator and denominator of each row."""
    return np.array(
        [[part for name in names for part in METRICS[name].parts(row)] for row in rows], dtype=float
    ).reshape(len(rows), -1)


def resampled(parts: np.ndarray, groups: Sequence[str], *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """The sums of the columns of `parts` [N, K] over as many groups as there are, drawn with replacement,
    `resamples` times."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1
    sums = np.zeros((count, parts.shape[1]))
    np.add.at(sums, member, parts)
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, AT_ONCE):
        yield from (
            generator.multinomial(count, np.full(count, 1 / count), size=min(AT_ONCE, resamples - start))
            @ sums
        )


def _value(name: str, numerator: float, denominator: float) -> float:
    return METRICS[name].finish(numerator / denominator) if denominator else math.nan


def _interval(sample: np.ndarray, groups: int) -> tuple[float | None, float | None]:
    known = sample[~np.isnan(sample)]  # a draw may hold no row that has a say
    if groups < 2 or not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
