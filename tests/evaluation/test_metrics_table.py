"""The table of metrics: a column for each model, shares in per cent, differences with their sign."""

from vlmtune.evaluation.metrics import MetricEstimate
from vlmtune.evaluation.metrics_table import DIFFERENCE, metrics_table


def test_two_models_and_their_difference() -> None:
    adapter = {"exact_match": MetricEstimate(0.75, 0.7, 0.8), "mae": MetricEstimate(1.5, None, None)}
    base = {"exact_match": MetricEstimate(0.5, 0.45, 0.55), "mae": MetricEstimate(2.0, None, None)}
    difference = {"exact_match": MetricEstimate(0.25, 0.2, 0.3), "mae": MetricEstimate(-0.5, None, None)}
    assert metrics_table({"adapter": adapter, "base": base, DIFFERENCE: difference}) == [
        "",
        "             adapter               base                  difference",
        "exact_match  75.0 %  [70.0, 80.0]  50.0 %  [45.0, 55.0]  +25.0 %  [+20.0, +30.0]",
        "mae          1.5                   2                     -0.5",
        "",
    ]
