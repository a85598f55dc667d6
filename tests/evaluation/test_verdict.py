"""What is said of a difference follows its interval."""

import pytest

from vlmtune.evaluation.metrics import MetricEstimate
from vlmtune.evaluation.verdict import few_rows_warning, verdict_of, verdict_text


@pytest.mark.parametrize(
    ("name", "low", "high", "word"),
    [
        ("exact_match", 0.01, 0.2, "better"),
        ("exact_match", -0.2, -0.01, "worse"),
        ("exact_match", -0.1, 0.25, "no measurable difference"),
        ("exact_match", 0.0, 0.25, "no measurable difference"),
        ("exact_match", -0.25, 0.0, "no measurable difference"),
        ("exact_match", None, None, "no measurable difference"),
        ("mae", -2.0, -0.1, "better"),
        ("mae", 0.1, 2.0, "worse"),
    ],
)
def test_only_an_interval_on_one_side_of_zero_tells(
    name: str, low: float | None, high: float | None, word: str
) -> None:
    assert verdict_of(name, MetricEstimate(0.075, low, high)) == word


def test_the_words_have_the_numbers() -> None:
    text = verdict_text("exact_match", MetricEstimate(0.075, -0.1, 0.25), 40)
    assert text == "no measurable difference (+7.5 points, -10 to +25, 40 rows)"
    assert verdict_text("mae", MetricEstimate(-1.5, -2.0, -0.25), 1200) == (
        "better (-1.5, -2 to -0.25, 1,200 rows)"
    )
    alone = verdict_text("exact_match", MetricEstimate(1.0, None, None), 1)
    assert alone == "no measurable difference (+100 points, no interval, 1 row)"


def test_few_rows_are_named() -> None:
    assert [few_rows_warning(rows) for rows in (0, 1, 49, 50)] == [
        "no test rows cannot tell much",
        "1 test row cannot tell much",
        "49 test rows cannot tell much",
        None,
    ]
