"""The points of a search before it has results, and the recipe that people use without one."""

import math

import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.first_points import (
    BASELINE,
    RECIPE,
    SPREAD,
    TPE,
    FirstPoints,
    proposals_text,
    recipe_outside_space,
    recipe_parameters,
    recipe_values,
    trial_count,
    usual_rate,
)
from vlmtune.search.space import Space

RATES = {"loguniform": [1e-5, 1e-2]}
CONFIG = Settings.from_flags(
    {"recipe": {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32}, "lora_r": 8, "lora_alpha": 16}
)


def space(settings: Settings = CONFIG, **entries: object) -> Space:
    return Space.parse({"learning_rate": RATES, **entries}, settings)


def test_the_recipe_is_a_trial_where_the_space_has_its_values() -> None:
    tied = {"lora_r": {"choice": [8, 16]}, "lora_alpha": {"expr": "2 * lora_r"}}
    assert recipe_parameters(space(**tied)) == {"learning_rate": 2e-4, "lora_r": 16}
    assert recipe_outside_space(space(**tied)) is None
    halved = {**tied, "lora_alpha": {"expr": "lora_r"}}
    assert recipe_parameters(space(**halved)) is None, "it would get another alpha"
    assert recipe_parameters(space()) is None, "the rank is not searched, and is another one"
    assert recipe_parameters(space(lora_r={"choice": [4, 8]})) is None


def test_elsewhere_it_is_a_run_beside_a_search_of_enough_trials() -> None:
    assert recipe_outside_space(space()) == recipe_values(space())
    assert trial_count(space()) == 17
    few = CONFIG.replace(num_samples=7)
    assert recipe_outside_space(space(few)) is None
    assert trial_count(space(few)) == 7
    without = CONFIG.replace(recipe=None)
    assert recipe_values(space(without)) is None
    assert trial_count(space(without)) == 16
    grid = {"learning_rate": {"grid": [1e-5 * 2**power for power in range(9)]}}
    assert trial_count(Space.parse(grid, CONFIG)) == 10
    the_same = CONFIG.replace(learning_rate=2e-4, lora_r=16, lora_alpha=32)
    assert recipe_outside_space(space(the_same)) is None, "the baseline is the recipe"


def test_a_wrong_recipe_is_named() -> None:
    with pytest.raises(ConfigError, match="recipe: lora_r"):
        recipe_values(space(CONFIG.replace(recipe={"lora_r": 0})))


@pytest.mark.parametrize("width", [128, 4096])
def test_points_are_denser_around_the_usual_rate_and_reach_everywhere(width: int) -> None:
    points = FirstPoints(space(lora_r={"choice": [4, 8, 16]}).distributions, usual_rate(width), seed=1)
    drawn = [points[number] for number in range(60)]
    apart = [abs(math.log(one["learning_rate"] / usual_rate(width))) for one in drawn]
    assert sum(one < math.log(3) for one in apart) > 25
    assert min(one["learning_rate"] for one in drawn) < 5e-5
    assert max(one["learning_rate"] for one in drawn) > 2e-3
    ranks = [one["lora_r"] for one in drawn]
    assert all(15 <= ranks.count(rank) <= 25 for rank in (4, 8, 16))
    assert drawn == [points[number] for number in range(60)]
    assert drawn[0] != FirstPoints(points.distributions, usual_rate(width), seed=2)[0]


def test_every_kind_of_distribution_is_spread_within_its_bounds() -> None:
    entries = {
        "lora_dropout": {"quniform": [0.0, 0.1, 0.05]},
        "lora_alpha": {"lograndint": [4, 65]},
        "weight_decay": {"uniform": [0.0, 0.1]},
        "per_device_train_batch_size": {"randint": [1, 5]},
    }
    searched = space(**entries)
    points = FirstPoints(searched.distributions, None, seed=0)
    for number in range(40):
        for name, value in points[number].items():
            assert searched.distributions[name].contains(value), (name, value)
    assert {points[number]["lora_dropout"] for number in range(40)} == {0.0, 0.05, 0.1}
    assert {points[number]["per_device_train_batch_size"] for number in range(40)} == {1, 2, 3, 4}


def test_a_search_without_proposals_of_the_model_says_why() -> None:
    few = [BASELINE, RECIPE, *[SPREAD] * 4, *[TPE] * 10]
    assert proposals_text(few) == "10 of 16 by TPE, 4 spread over the space, baseline and recipe"
    none = proposals_text([BASELINE, RECIPE, *[SPREAD] * 14])
    assert none.startswith("0 of 16 by TPE") and "--max_concurrent_trials" in none
    assert proposals_text(["grid"] * 4) == "4 points of the grid"
