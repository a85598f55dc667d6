"""Distributions: the values that they draw and contain. `test_space.py` tests their error messages."""

from typing import Any

import optuna
import pytest

from vlmtune.config.flag_table import find_flag
from vlmtune.search.distributions import NUMERIC, read_categorical, read_numeric

CASES: dict[str, tuple[str, list[float]]] = {
    "uniform": ("lora_dropout", [0.0, 0.1]),
    "quniform": ("lora_dropout", [0.0, 0.1, 0.05]),
    "loguniform": ("learning_rate", [1e-5, 1e-3]),
    "qloguniform": ("learning_rate", [1e-4, 1e-2, 1e-4]),
    "randint": ("lora_r", [1, 9]),
    "lograndint": ("lora_r", [1, 65]),
}


@pytest.mark.parametrize("kind", NUMERIC)
def test_every_drawn_value_is_contained(kind: str) -> None:
    name, arguments = CASES[kind]
    distribution = read_numeric(kind, arguments, find_flag(name), name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    values = [distribution.suggest(study.ask(), name) for _ in range(50)]
    assert all(distribution.contains(value) for value in values)
    assert len(set(values)) > 2
    low, high = distribution.ends
    assert low <= min(values) and max(values) <= high
    assert not distribution.contains(high * 2)


@pytest.mark.parametrize(
    ("value", "contained"), [(0.05, True), (0.04, False), ("0.05", False), (True, False)]
)
def test_a_quantum_admits_its_multiples_only(value: Any, contained: bool) -> None:
    distribution = read_numeric("quniform", [0.0, 0.1, 0.05], find_flag("lora_dropout"), "lora_dropout")
    assert distribution.contains(value) == contained


def test_lists_are_choices_and_json_to_optuna() -> None:
    lists = [["q_proj"], ["q_proj", "k_proj"]]
    distribution = read_categorical("choice", lists, find_flag("lora_target_modules"), "lora_target_modules")
    assert distribution.contains(["q_proj"])
    assert distribution.parameter(["q_proj"]) == '["q_proj"]'
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert distribution.suggest(study.ask(), "lora_target_modules") in lists
