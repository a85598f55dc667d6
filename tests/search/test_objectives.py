"""Objectives of a search: which metrics there are, and which direction is better."""

import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.objectives import check_objectives, mode_of, objectives_of

BASE = Settings.from_flags({"model_name_or_path": "m", "data_path": "d"})


def test_the_first_objective_is_the_metric_and_others_know_their_mode() -> None:
    settings = BASE.replace(
        metric="exact_match", mode="max", more_metrics=["seconds", "rows_per_second", "peak_memory"]
    )
    check_objectives(settings)
    assert objectives_of(settings) == {
        "exact_match": "max",
        "seconds": "min",
        "rows_per_second": "max",
        "peak_memory": "min",
    }
    assert mode_of("mae") == "min"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"metric": "exact_matches"}, r"--metric exact_matches: no trial reports it; .*mean exact_match\?"),
        ({"metric": "rouge_l"}, r"--metric rouge_l: higher is better for this metric: add --mode max"),
        ({"metric": "mae", "mode": "max"}, r"--metric mae: lower is better for this metric: add --mode min"),
        ({"more_metrics": ["exact_match"]}, r"--more_metrics exact_match: no trial reports it"),
        ({"more_metrics": ["eval_loss"]}, r"--more_metrics eval_loss: is an objective already"),
        ({"more_metrics": ["seconds", "seconds"]}, r"--more_metrics seconds: is an objective already"),
    ],
)
def test_a_wrong_objective_is_named_with_its_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objectives(BASE.replace(**flags))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("eval_loss", "min"), ("seconds", "min"), ("rows_per_second", "max"), ("exact_match", "max")],
)
def test_which_way_a_number_is_better(name: str, mode: str) -> None:
    assert mode_of(name) == mode
