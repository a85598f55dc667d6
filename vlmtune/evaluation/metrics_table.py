"""The metrics of an evaluation as lines of text."""

from collections.abc import Mapping

from vlmtune.evaluation.metrics import METRICS, MetricEstimate

DIFFERENCE = "difference"  # the column of the difference between two models


def metrics_table(columns: Mapping[str, Mapping[str, MetricEstimate]]) -> list[str]:
    """Lay out metrics in columns, with 95 % intervals in brackets and an empty line before and after.

    Args:
        columns: the metrics of each model, and their difference under DIFFERENCE; all have the same metrics.
    """
    lines = [["", *columns]]
    for metric in next(iter(columns.values())):
        cells = [
            format_estimate(metric, entry[metric], signed=name == DIFFERENCE)
            for name, entry in columns.items()
        ]
        lines.append([metric, *cells])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return ["", *rows, ""]


def format_estimate(metric: str, estimate: MetricEstimate, *, signed: bool) -> str:
    """A metric with its interval: a share in per cent, another number with four digits."""
    share = METRICS[metric].share

    def text(value: float) -> str:
        sign = "+" if signed and value > 0 else ""
        return f"{sign}{100 * value:.1f}" if share else f"{sign}{value:.4g}"

    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"  [{text(estimate.low)}, {text(estimate.high)}]"
    return f"{text(estimate.value)}{' %' if share else ''}{interval}"
