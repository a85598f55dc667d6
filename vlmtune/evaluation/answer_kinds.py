"""Whether the answers of a data set are counts, other numbers or text, and whether they are few and short."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from vlmtune.evaluation.numbers import split_numbers
from vlmtune.evaluation.text import normalize

AnswerKind = Literal["count", "number", "text"]
LARGEST_COUNT = 1000  # years, prices and house numbers are mostly larger, or come with other words
MAX_TEXTS = 0.2  # different texts around the numbers, as a share of the rows: with more, answers are text
MAX_CLASSES = 12  # different answers that a table of confusions has room for
MAX_CLASS_LENGTH = 30  # characters of each of these answers


def answer_kind(references: Sequence[str]) -> AnswerKind:
    """The kind of the reference answers.

    Counts are whole numbers from 0 to LARGEST_COUNT, alone or in one of a few sentences ("There are 3
    people."). Temperatures and prices are numbers. Dates, times, telephone numbers, model names, and answers
    with several numbers or with different words each time are text.
    """
    around: Counter[str] = Counter()
    values = []
    for reference in references:
        numbers, rest = split_numbers(reference)
        if len(numbers) == 1:
            values.append(numbers[0])
            around[rest] += 1
    if not values or 2 * len(values) < len(references):
        return "text"
    if len(around) > max(2, MAX_TEXTS * len(values)) or any(_is_code(text) for text in references):
        return "text"
    counts = all(value == int(value) and 0 <= value <= LARGEST_COUNT for value in values)
    return "count" if counts else "number"


def _is_code(text: str) -> bool:
    """Whether digits of a text are a code: 007, 12:30, 2024-05-01."""
    word = text.strip().rstrip(".")
    leading_zero = len(word) > 1 and word.isdigit() and word[0] == "0"
    between = zip(word, word[1:], word[2:], strict=False)
    return leading_zero or any(
        left.isdigit() and mark in ":/-" and right.isdigit() for left, mark, right in between
    )


def answer_classes(references: Sequence[str]) -> list[str] | None:
    """The different answers, the most common first, if they are few and short enough for a confusion table.

    They are compared after `text.normalize`; each is spelled as in its first row. None if there are more than
    MAX_CLASSES, or if most of them occur only once.
    """
    written: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reference in references:
        key = normalize(reference)
        written.setdefault(key, reference.strip())
        counts[key] += 1
    short = all(len(text) <= MAX_CLASS_LENGTH for text in written.values())
    if not 2 <= len(counts) <= MAX_CLASSES or not short or 2 * len(counts) > len(references):
        return None
    return [written[key] for key, _ in counts.most_common()]
