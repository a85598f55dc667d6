"""The kind of an option, from its type annotation."""

from enum import Enum
from typing import Any, Literal

import pytest

from vlmtune.config.kinds import kind_of_hint


class Strategy(Enum):
    STEPS = "steps"
    EPOCH = "epoch"


@pytest.mark.parametrize(
    ("hint", "kind"),
    [
        (int, ("int", False, ())),
        (float | None, ("float", True, ())),
        (bool | None, ("bool", True, ())),
        (list[str] | str | None, ("list", True, ())),
        (dict[str, Any] | str, ("dict", False, ())),
        (Literal["min", "max"], ("str", False, ("min", "max"))),
        (Strategy | str, ("str", False, ("steps", "epoch"))),
        (str, ("str", False, ())),
    ],
)
def test_the_kind_of_an_annotation(hint: Any, kind: tuple[str, bool, tuple[str, ...]]) -> None:
    assert kind_of_hint(hint) == kind
