"""Arithmetic over option names: its values, and what it refuses."""

import pytest

from vlmtune.errors import ConfigError
from vlmtune.search.expression import Expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * lora_r", 16),
        ("max(lora_r // 3, 1)", 2),
        ("lora_r ** 2 if lora_r > 4 else -1", 64),
        ("1 < lora_r <= 8", True),
        ("round(sqrt(lora_r) * 100)", 283),
    ],
)
def test_an_expression_has_the_value_that_python_gives(text: str, value: float) -> None:
    assert Expression.parse(text, "lora_alpha").evaluate({"lora_r": 8, "learning_rate": 1e-4}, "") == value


def test_variables_are_named_once_in_order() -> None:
    assert Expression.parse("min(b, a) + b", "x").variables == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (8, "an expr is a text"),
        ("", "an expr is a text"),
        ("2 *", "does not parse"),
        ("__import__('os')", "is not allowed"),
        ("lora_r.real", "lora_r.real is not allowed"),
        ("[lora_r][0]", "is not allowed"),
        ("1 +" * 200 + " 1", "is too long"),
    ],
)
def test_anything_else_is_refused(text: object, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^lora_alpha: ") as caught:
        Expression.parse(text, "lora_alpha")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["1 / (lora_r - 8)", "sqrt(-lora_r)", "lora_r ** 99", "2.0 ** 64 ** 64"])
def test_an_expression_without_a_value_names_the_values(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^lora_alpha: expr .* has no value where lora_r is 8: "):
        Expression.parse(f"lora_r * 0 + {text}", "lora_alpha").evaluate({"lora_r": 8}, "lora_alpha")


@pytest.mark.parametrize("text", ["round(1, -999999999)", "int(1, 2)", "abs(1, 2)", "sqrt(2, 2)"])
def test_functions_of_one_value_take_one(text: str) -> None:
    with pytest.raises(ConfigError, match="takes one value, not 2"):
        Expression.parse(text, "lora_r")


@pytest.mark.parametrize(
    "text", ["int(1e300)", "2 ** 64 * 2", "max(9 ** 60, 1)", "round(1e300)", "1e300 * 1e300"]
)
def test_values_have_a_bound(text: str) -> None:
    with pytest.raises(ConfigError, match="has no value"):
        Expression.parse(text, "lora_r").evaluate({}, "lora_r")
