"""Says by a 95 % interval whether two models differ on the same rows by more than chance."""

from typing import Literal

from vlmtune.evaluation.metrics import METRICS, MetricEstimate

Verdict = Literal["better", "worse", "no measurable difference"]
BETTER: Verdict = "better"
WORSE: Verdict = "worse"
UNCLEAR: Verdict = "no measurable difference"
FEW_ROWS = 50  # with fewer rows, the interval of a percentage can be more than 28 points wide


def verdict_of(name: str, difference: MetricEstimate) -> Verdict:
    """The verdict on a metric's difference: better or worse only if the whole interval lies on one side of 0.

    Without an interval (all rows are about the same image), there is no measurable difference.
    """
    low, high = difference.low, difference.high
    if low is None or high is None or low <= 0 <= high:
        return UNCLEAR
    return BETTER if (low > 0) == (METRICS[name].mode == "max") else WORSE


def verdict_text(name: str, difference: MetricEstimate, rows: int) -> str:
    """The verdict with its numbers: `no measurable difference (+7.5 points, -10 to +25, 40 rows)`."""
    plural = "" if rows == 1 else "s"
    return f"{verdict_of(name, difference)} ({format_difference(name, difference)}, {rows:,} row{plural})"


def format_difference(name: str, difference: MetricEstimate, *, unit: str = " points") -> str:
    """A difference with sign and interval: `+7.5 points, -10 to +25`.

    The difference of two shares is in percentage points.
    """
    share = METRICS[name].share

    def text(value: float) -> str:
        return f"{100 * value:+.1f}".removesuffix(".0") if share else f"{value:+.2g}"

    interval = ", no interval"
    if difference.low is not None and difference.high is not None:
        interval = f", {text(difference.low)} to {text(difference.high)}"
    return f"{text(difference.value)}{unit if share else ''}{interval}"


def few_rows_warning(rows: int, noun: str = "test row") -> str | None:
    """The warning for a result on fewer than FEW_ROWS rows, `2 test rows cannot tell much`; else None."""
    if rows >= FEW_ROWS:
        return None
    return f"{rows or 'no'} {noun}{'' if rows == 1 else 's'} cannot tell much"
