"""Axes of the report's plots."""

import pytest

from vlmtune.search.report.plot import Scale


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 10.0], ["0", "5", "10"]),
        ([1e-4, 1e-1], ["0.0001", "0.001", "0.01", "0.1"]),
        ([0.02, 0.6], ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        ([3.0, 3.0], ["2", "3", "4"]),
        ([-2.0, 2.0], ["-2", "-1", "0", "1", "2"]),
    ],
)
def test_axes_have_a_handful_of_round_numbers_within_them(values: list[float], ticks: list[str]) -> None:
    scale = Scale.of(values)
    assert [text for _, text in scale.ticks()] == ticks
    assert all(0 <= scale.at(value) <= 1 for value in values)
    assert scale.at(scale.low) == 0 and scale.at(scale.high) == 1


def test_few_values_or_texts_stand_side_by_side_and_numbers_keep_their_distance() -> None:
    scale, places = Scale.of_values([["q_proj"], "all-linear", ["q_proj"]])
    assert (scale.names, places) == (('["q_proj"]', "all-linear"), [0.0, 1.0, 0.0])
    scale, places = Scale.of_values([8, 4, 16])
    assert (scale.names, places) == (("4", "8", "16"), [1.0, 0.0, 2.0])
    scale, places = Scale.of_values([1, 2, 3, 4, 10])
    assert (scale.names, places) == ((), [1.0, 2.0, 3.0, 4.0, 10.0])
