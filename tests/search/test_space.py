import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search.optuna import OptunaSearch

from vlmtune.config.flag_table import flags
from vlmtune.config.parse import parse
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.space import Space
from vlmtune.search.space_entries import FIXED

ROOT = Path(__file__).parents[2]
BASELINE = Settings.from_flags(
    {"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4, "max_length": 512, "lora_dropout": 0.05}
)
SPACE = {
    "lora_r": {"choice": [4, 8, 16]},
    "lora_alpha": {"expr": "2 * lora_r"},
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
    "max_length": {"choice": [256, 512]},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def run(space: Space, trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """The values of the first trials that a TPE sampler draws where smaller learning rates and ranks are
    better."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(space.baseline_parameters())
    drawn = []
    for _ in range(trials):
        trial = study.ask()
        values = space(trial)
        drawn.append(values)
        study.tell(trial, float(values.get("learning_rate", 1.0)) * float(values.get("lora_r", 1)))
    return drawn


def test_the_first_trial_is_the_baseline_and_later_ones_follow_the_space() -> None:
    space = Space.parse(SPACE, BASELINE)
    assert space.names == ["lora_r", "lora_alpha", "learning_rate", "max_length"]
    assert not space.is_grid
    first, *others = run(space, 30)
    assert (
        first == space.baseline == {"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4, "max_length": 512}
    )
    assert all(list(values) == space.names for values in others)
    assert all(values["lora_alpha"] == 2 * values["lora_r"] for values in others)
    assert all(1e-5 <= values["learning_rate"] <= 1e-2 for values in others)
    assert {values["lora_r"] for values in others} == {4, 8, 16}
    assert {values["max_length"] for values in others} == {256, 512}


def test_baseline_values_inside_the_space_are_seen_by_the_sampler_and_others_are_not() -> None:
    space = Space.parse(
        {**SPACE, "lora_r": {"choice": [32, 64]}, "max_length": {"randint": [512, 600]}}, BASELINE
    )
    assert space.baseline_outside == {"lora_r": 8}
    assert space.baseline_parameters() == {"learning_rate": 1e-4, "max_length": 512}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.baseline_parameters())
    trial = study.ask()
    assert space(trial) == space.baseline
    assert trial.params == {"learning_rate": 1e-4, "max_length": 512}
    second = study.ask()
    assert space(second)["lora_r"] in (32, 64)
    assert set(second.params) == {"lora_r", "learning_rate", "max_length"}


# An option, its distribution, and what every drawn value must fulfil.
DRAWS: list[tuple[str, dict[str, list[float]], type, Callable[[Any], bool]]] = [
    ("lora_dropout", {"uniform": [0, 0.5]}, float, lambda v: 0 <= v <= 0.5),
    ("lora_dropout", {"quniform": [0.0, 0.3, 0.1]}, float, lambda v: v in (0.0, 0.1, 0.2, 0.3)),
    ("lora_r", {"quniform": [4, 16, 4]}, int, lambda v: v in (4, 8, 12, 16)),
    ("learning_rate", {"loguniform": [1e-6, 1e-3]}, float, lambda v: 1e-6 <= v <= 1e-3),
    (
        "learning_rate",
        {"qloguniform": [1e-5, 5e-4, 1e-5]},
        float,
        lambda v: v in {float(f"{n}e-5") for n in range(1, 51)},
    ),
    ("lora_r", {"qloguniform": [4, 64, 4]}, int, lambda v: v in range(4, 65, 4)),
    ("lora_r", {"randint": [2, 5]}, int, lambda v: v in (2, 3, 4)),
    ("lora_r", {"lograndint": [1, 5]}, int, lambda v: v in (1, 2, 3, 4)),
    ("num_train_epochs", {"randint": [1, 4]}, float, lambda v: v in (1.0, 2.0, 3.0)),
]


@pytest.mark.parametrize(("name", "entry", "kind", "holds"), DRAWS)
def test_drawn_values_are_of_the_options_type_and_in_the_distribution(
    name: str, entry: dict[str, list[float]], kind: type, holds: Callable[[Any], bool]
) -> None:
    drawn = [values[name] for values in run(Space.parse({name: entry}, BASELINE), 60)[1:]]
    assert {type(value) for value in drawn} == {kind}
    assert [value for value in drawn if not holds(value)] == []
    assert len(set(drawn)) > 2


def test_bounds_are_tunes() -> None:
    drawn = {
        values["lora_r"] for values in run(Space.parse({"lora_r": {"randint": [2, 4]}}, BASELINE), 40)[1:]
    }
    assert drawn == {2, 3}
    drawn = {
        values["lora_r"] for values in run(Space.parse({"lora_r": {"quniform": [2, 4, 2]}}, BASELINE), 40)[1:]
    }
    assert drawn == {2, 4}


@settings(max_examples=60, deadline=None)
@given(
    quantum=st.sampled_from([1e-6, 3e-5, 0.01, 0.1, 0.25]),
    low=st.integers(1, 5),
    more=st.integers(1, 40),
    log=st.booleans(),
    seed=st.integers(0, 99),
)
def test_quantised_values_are_multiples_within_the_bounds(
    quantum: float, low: int, more: int, log: bool, seed: int
) -> None:
    exact = Fraction(str(quantum))
    bounds = [float(exact * low), float(exact * (low + more))]
    space = Space.parse(
        {"weight_decay": {"qloguniform" if log else "quniform": [*bounds, quantum]}}, BASELINE
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    study.ask()
    for _ in range(5):
        value = space(study.ask())["weight_decay"]
        assert value == float(round(value / quantum) * exact)
        assert bounds[0] <= value <= bounds[1]


def test_lists_and_missing_values_can_be_chosen() -> None:
    names = [["q_proj"], ["q_proj", "v_proj"], "all-linear"]
    space = Space.parse(
        {
            "target_modules": {"choice": names},
            "max_length": {"choice": [512, None]},
            "use_rslora": {"choice": [True, False]},
        },
        BASELINE,
    )
    assert space.baseline_outside == {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    drawn = run(space, 30)
    assert drawn[0] == {
        "lora_target_modules": BASELINE.lora.target_modules,
        "max_length": 512,
        "use_rslora": False,
    }
    assert all(values["lora_target_modules"] in names for values in drawn[1:])
    assert {values["max_length"] for values in drawn} == {512, None}
    assert all(BASELINE.replace(**values) for values in drawn)


def test_constants_are_applied_not_searched() -> None:
    space = Space.parse(
        {
            "lora_r": 4,
            "lora_dropout": {"choice": [0.1]},
            "lora_alpha": {"expr": "2 * lora_r"},
            "max_steps": {"randint": [1, 9]},
        },
        BASELINE,
    )
    assert space.names == ["lora_alpha", "max_steps"]
    first, second = run(space, 2)
    assert first == {"lora_alpha": 20, "max_steps": -1, "lora_r": 4, "lora_dropout": 0.1}
    assert second == {"lora_alpha": 8, "max_steps": second["max_steps"], "lora_r": 4, "lora_dropout": 0.1}
    assert space.settings.lora.r == 4


def test_grids_are_listed_with_the_baseline_first() -> None:
    space = Space.parse(
        {"lora_r": {"grid": [4, 8]}, "max_length": {"grid": [256, 512]}, "use_rslora": True}, BASELINE
    )
    assert space.is_grid
    assert space.names == ["lora_r", "max_length"]
    points = [(point["lora_r"], point["max_length"]) for point in space.grid()]
    assert points == [(8, 512), (4, 256), (4, 512), (8, 256)]
    assert len(space) == 4
    assert all(point["use_rslora"] for point in space.grid())


def test_a_grid_without_the_baseline_keeps_its_order() -> None:
    space = Space.parse({"lora_r": {"grid": [4, 8]}, "lora_alpha": {"expr": "2 * lora_r"}}, BASELINE)
    assert space.grid() == [{"lora_r": 4, "lora_alpha": 8}, {"lora_r": 8, "lora_alpha": 16}]


def test_every_end_is_a_corner_however_large_the_space() -> None:
    many = {
        name: {"choice": [0.0, 0.1, 0.2, 0.3]}
        for name in ("lora_dropout", "weight_decay", "max_grad_norm", "adam_beta1")
    }
    space = Space.parse(
        {
            "use_dora": {"choice": [False, True]},
            "lora_r": {"choice": [4, 8, 16, 32]},
            **many,
            "lora_alpha": {"choice": [1, 2, 4, 8]},
        },
        BASELINE,
    )
    corners = list(space.corners())
    assert any(corner["use_dora"] for corner in corners)
    assert max(corner["lora_r"] for corner in corners) == 32
    assert len(corners) < 1100


def test_a_space_of_constants_is_a_grid_of_one_point() -> None:
    space = Space.parse({"lora_r": 4}, BASELINE)
    assert (space.is_grid, len(space), space.grid(), space.names) == (True, 1, [{"lora_r": 4}], [])


def test_a_space_that_is_no_grid_has_no_length_but_is_true() -> None:
    space = Space.parse(SPACE, BASELINE)
    assert bool(space)
    with pytest.raises(TypeError, match="all grid"):
        len(space)
    with pytest.raises(TypeError, match="all grid"):
        space.grid()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * lora_r", 16),
        ("lora_r * 4 // 3", 10),
        ("lora_r ** 2 % 7 + 1", 2),
        ("-lora_r + 20 - +1", 11),
        ("max(16, min(lora_r, 4), 3)", 16),
        ("sqrt(lora_r * 2) * 2", 8),
        ("round(lora_r / 3)", 3),
        ("int(lora_r * 1.6)", 12),
        ("abs(float(lora_r) - 20)", 12),
        ("64 if learning_rate < 1e-5 else 32", 32),
        ("64 if 1e-5 < learning_rate <= 1e-4 else 32", 64),
        ("(lora_r + 1) * 2", 18),
        ("7 if lr_scheduler_type == 'linear' else 9", 7),
    ],
)
def test_expressions(text: str, value: int) -> None:
    space = Space.parse({"lora_alpha": {"expr": text}, "weight_decay": {"choice": [0, 0.1]}}, BASELINE)
    drawn = run(space, 2)[1]["lora_alpha"]
    assert (drawn, type(drawn)) == (value, int)


def test_expressions_may_need_each_other_in_any_order() -> None:
    raw = {
        "max_steps": {"expr": "lora_alpha * 2"},
        "lora_alpha": {"expr": "lora_r * 2"},
        "lora_r": {"choice": [2, 3]},
    }
    for values in run(Space.parse(raw, BASELINE), 10)[1:]:
        assert list(values) == ["max_steps", "lora_alpha", "lora_r"]
        assert values["max_steps"] == 2 * values["lora_alpha"] == 4 * values["lora_r"]


# A space that cannot be, and what its message says.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "search_space: is empty"),
    ({"lora_rr": {"choice": [1, 2]}}, "search_space: lora_rr: there is no such option; did you mean lora_r?"),
    (
        {"lora_r": {"chioce": [1, 2]}},
        "search_space: lora_r: there is no distribution 'chioce'; did you mean choice?",
    ),
    ({"lora_r": {"choice": []}}, "search_space: lora_r: choice takes a list of values"),
    (
        {"lora_r": {"choice": 8}},
        "search_space: lora_r: choice takes a list of values, as in {choice: [8, 16]}, not 8",
    ),
    ({"lora_r": {"choice": [8, 8]}}, "search_space: lora_r: choice holds 8 twice"),
    ({"lora_r": {"choice": [8, 8.5]}}, "search_space: lora_r: choice: 8.5 is not a whole number"),
    ({"lora_r": {"choice": [0, 8]}}, "search_space: lora_r: choice: 0 must be at least 1"),
    (
        {"lora_r": [4, 8]},
        "search_space: lora_r: [4, 8] is a list; to search these values write {choice: [...]}",
    ),
    ({"lora_r": {}}, "search_space: lora_r: must hold one distribution"),
    (
        {"lora_r": {"choice": [4, 8], "grid": [4]}},
        "search_space: lora_r: must hold one distribution, as in {choice: [8, 16]}, not 2",
    ),
    ({"lora_r": 4.5}, "search_space: lora_r: 4.5 is not a whole number"),
    ({"lora_r": None}, "search_space: lora_r: has no value"),
    (
        {"lora_r": {"uniform": [4, 8]}},
        "search_space: lora_r: uniform draws fractions, but lora_r is a whole number; "
        "use randint or quniform",
    ),
    ({"lora_r": {"loguniform": [4, 8]}}, "search_space: lora_r: loguniform draws fractions"),
    ({"lora_r": {"quniform": [4, 8, 0.5]}}, "search_space: lora_r: quniform needs whole numbers here"),
    (
        {"lora_r": {"randint": [4, 8, 2]}},
        "search_space: lora_r: randint takes 2 numbers, [lower, upper], not [4, 8, 2]",
    ),
    ({"lora_r": {"randint": [0, 8]}}, "search_space: lora_r: randint: 0 must be at least 1"),
    ({"lora_r": {"lograndint": [0, 8]}}, "search_space: lora_r: lograndint's lower bound 0 must be above 0"),
    ({"learning_rate": {"uniform": [1e-4]}}, "search_space: learning_rate: uniform takes 2 numbers"),
    ({"learning_rate": {"uniform": ["a", "b"]}}, "search_space: learning_rate: uniform takes 2 numbers"),
    ({"learning_rate": {"uniform": {"lower": 1}}}, "search_space: learning_rate: uniform takes 2 numbers"),
    (
        {"learning_rate": {"uniform": [1e-3, 1e-4]}},
        "search_space: learning_rate: uniform's lower bound 0.001 must be below its upper bound 0.0001",
    ),
    ({"learning_rate": {"uniform": [1e-4, 1e-4]}}, "search_space: learning_rate: uniform's lower bound"),
    (
        {"learning_rate": {"uniform": [0.1, math.inf]}},
        "search_space: learning_rate: uniform: Infinity is not a number",
    ),
    (
        {"learning_rate": {"uniform": [math.nan, 1]}},
        "search_space: learning_rate: uniform: NaN is not a number",
    ),
    (
        {"learning_rate": {"loguniform": [0, 1e-4]}},
        "search_space: learning_rate: loguniform's lower bound 0 must be above 0",
    ),
    (
        {"lora_dropout": {"quniform": [0, 0.5, 0]}},
        "search_space: lora_dropout: quniform's quantum 0 must be above 0",
    ),
    (
        {"lora_dropout": {"quniform": [0.05, 0.5, 0.1]}},
        "search_space: lora_dropout: quniform's bounds 0.05 and 0.5 must be multiples of its quantum 0.1",
    ),
    (
        {"lora_dropout": {"uniform": [0, 1]}},
        "search_space: lora_dropout: uniform: 1 must be at least 0 and below 1",
    ),
    ({"lr_scheduler_type": {"uniform": [0, 1]}}, "search_space: lr_scheduler_type: uniform draws numbers"),
    (
        {"lr_scheduler_type": {"choice": ["linear", "cosin"]}},
        "search_space: lr_scheduler_type: choice: 'cosin' is not one of",
    ),
    (
        {"max_length": {"choice": [8, 9]}, "max_seq_length": 8},
        "search_space: max_seq_length: is another name of max_length",
    ),
    (
        {"lora_r": {"grid": [4, 8]}, "max_steps": {"randint": [1, 9]}},
        "search_space: max_steps: is drawn, but lora_r is a grid",
    ),
    (
        {"data_path": {"choice": ["a", "b"]}},
        "search_space: data_path: cannot be searched, as all trials share the same prepared rows",
    ),
    ({"num_samples": 8}, "search_space: num_samples: cannot be searched, as it describes the search itself"),
    (
        {"model_name_or_path": "a"},
        "search_space: model_name_or_path: cannot be searched, as all trials share one frozen base",
    ),
    ({"quantization": {"choice": ["nf4", "int8"]}}, "search_space: quantization: cannot be searched"),
    ({"output_dir": "a"}, "search_space: output_dir: cannot be searched"),
    (
        {"eval_steps": {"choice": [0.25, 0.5]}},
        "search_space: eval_steps: cannot be searched, as all trials are evaluated alike",
    ),
    (
        {"seed": {"randint": [0, 9]}},
        "search_space: seed: cannot be searched, as all trials see the same split",
    ),
    (
        {"packing": {"choice": [True, False]}},
        "search_space: packing: choice: vlmtune does not take this option",
    ),
    ({"lora_alpha": {"expr": 16}}, "search_space: lora_alpha: an expr is a text"),
    ({"lora_alpha": {"expr": "2 *"}}, 'search_space: lora_alpha: expr "2 *" does not parse: invalid syntax'),
    ({"lora_alpha": {"expr": "x = 2"}}, 'search_space: lora_alpha: expr "x = 2" does not parse'),
    (
        {"lora_alpha": {"expr": "2 * lora_rr"}},
        'search_space: lora_alpha: expr "2 * lora_rr" names lora_rr, which is no option; '
        "did you mean lora_r?",
    ),
    ({"lora_alpha": {"expr": "__import__('os').getpid()"}}, "is not allowed"),
    ({"lora_alpha": {"expr": "lora_r.real"}}, "lora_r.real is not allowed"),
    ({"lora_alpha": {"expr": "[1, 2][0]"}}, "is not allowed"),
    ({"lora_alpha": {"expr": "max(key=1)"}}, "is not allowed"),
    (
        {"lora_alpha": {"expr": "lora_alpha + 1"}},
        "search_space: lora_alpha: its expr needs its own value: lora_alpha → lora_alpha",
    ),
    (
        {"lora_r": {"expr": "lora_alpha"}, "lora_alpha": {"expr": "lora_r"}},
        "needs its own value: lora_r → lora_alpha → lora_r",
    ),
    (
        {"lora_alpha": {"expr": "lora_r / 3"}},
        'search_space: lora_alpha: expr "lora_r / 3" where lora_r is 8: 2.66',
    ),
    ({"lora_alpha": {"expr": "lora_r - 8"}}, 'expr "lora_r - 8" where lora_r is 8: 0 must be at least 1'),
    ({"lora_alpha": {"expr": "1 / (lora_r - 8)"}}, "has no value where lora_r is 8: division by zero"),
    ({"lora_alpha": {"expr": "(0 - lora_r) ** 0.5"}}, "has no value where lora_r is 8"),
    ({"lora_alpha": {"expr": "9 ** 9 ** 9"}}, "too large a power"),
    ({"lora_alpha": {"expr": "9 ** 60"}}, "the result is too large"),
    ({"lora_alpha": {"expr": "'a' * 9"}}, "'a' is not a number"),
    ({"lora_alpha": {"expr": "max(lora_r)"}}, "has no value where lora_r is 8"),
    ({"lora_alpha": {"expr": "2 * data_path"}}, "has no value where data_path is None"),
    ({"lora_alpha": {"expr": "1 +" * 400 + "1"}}, "is too long"),
    ({"lora_alpha": {"expr": "-" * 499 + "1"}}, "search_space: lora_alpha"),
    (
        {"lora_alpha": {"expr": "3 * lora_r / 4"}, "lora_r": {"choice": [4, 8, 10]}},
        "where lora_r is 10: 7.5 is not a whole number",
    ),
]


@pytest.mark.parametrize(("raw", "message"), WRONG)
def test_a_wrong_space_is_named_with_its_option(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Space.parse(raw, BASELINE)
    assert message in str(caught.value)
    assert str(caught.value).startswith("search_space: ")
    assert "\n" not in str(caught.value)


def test_an_expression_that_fails_between_the_ends_says_where() -> None:
    space = Space.parse(
        {"lora_r": {"randint": [4, 9]}, "lora_alpha": {"expr": "lora_r / 2 + 2 / (lora_r - 6)"}}, BASELINE
    )
    with pytest.raises(ConfigError, match=r"where lora_r is (5|6|7)"):
        run(space, 60)


def test_every_supported_option_is_either_searchable_or_fixed_with_a_reason() -> None:
    assert set(FIXED) <= set(flags())
    for name in (
        "lora_vision",
        "use_dora",
        "optim",
        "lr_scheduler_type",
        "num_train_epochs",
        "max_grad_norm",
        "neftune_noise_alpha",
        "loss_type",
    ):
        option = flags()[name]
        entry = (
            {"choice": list(option.choices[:2])}
            if option.choices
            else {"choice": [True, False]}
            if option.kind == "bool"
            else {"uniform": [0.1, 0.5]}
        )
        assert Space.parse({name: entry}, BASELINE).names == [name]


def test_pickling_keeps_the_meaning() -> None:
    space = Space.parse({**SPACE, "target_modules": {"choice": [["q_proj"], ["v_proj"]]}}, BASELINE)
    drawn = run(space, 12, seed=3)
    assert run(pickle.loads(pickle.dumps(space)), 12, seed=3) == drawn
    assert run(space, 12, seed=4) != drawn


def suggested(space: Space, seed: int) -> list[dict[str, Any]]:
    search = OptunaSearch(
        space=space,
        metric="eval_loss",
        mode="min",
        seed=seed,
        points_to_evaluate=[space.baseline_parameters()],
    )
    found = []
    for number in range(12):
        values = search.suggest(str(number))
        assert values is not None
        found.append(values)
        search.on_trial_complete(str(number), {"eval_loss": values["learning_rate"], "training_iteration": 1})
    return found


def test_ray_suggests_the_same_values_for_the_same_seed(tmp_path: Path) -> None:
    space = Space.parse(
        {**SPACE, "target_modules": {"choice": [["q_proj"], ["v_proj"]]}, "weight_decay": 0.1}, BASELINE
    )
    first, *others = suggested(space, seed=1)
    assert first == {**space.baseline, "weight_decay": 0.1}
    assert all(
        values["lora_alpha"] == 2 * values["lora_r"] and values["weight_decay"] == 0.1 for values in others
    )
    assert all(values["lora_target_modules"] in (["q_proj"], ["v_proj"]) for values in others)
    assert suggested(pickle.loads(pickle.dumps(space)), seed=1) == [first, *others]
    assert suggested(space, seed=2)[1:] != others
    search = OptunaSearch(
        space=space, metric="eval_loss", mode="min", seed=1, points_to_evaluate=[space.baseline_parameters()]
    )
    search.save(str(tmp_path / "search.pkl"))
    again = OptunaSearch(space=space, metric="eval_loss", mode="min")
    again.restore(str(tmp_path / "search.pkl"))
    assert again.suggest("a") == first


@pytest.mark.parametrize("name", ["demo", "llava-1.5-7b", "llama-3.2-11b-vision"])
def test_shipped_spaces_hold_their_baseline(name: str) -> None:
    found = parse(["--config", str(ROOT / f"configs/{name}.yaml")])
    assert found.search.search_space
    space = Space.parse(found.search.search_space, found)
    assert space.baseline_outside == {}
    assert run(space, 3)[0] == space.baseline
    assert {"lora_r", "lora_alpha", "learning_rate"} <= set(space.names)
