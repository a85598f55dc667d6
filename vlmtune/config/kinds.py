"""The kinds of value that an option can have, found from its type annotation."""

from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

Kind = Literal["bool", "int", "float", "str", "list", "dict", "pairs", "paths", "numbers"]
# Kinds that take several values on a command line.
SEVERAL: tuple[Kind, ...] = ("list", "pairs", "paths", "numbers")


def kind_of_hint(hint: Any) -> tuple[Kind, bool, tuple[str, ...]]:
    """(kind, whether None is allowed, choices) of a type annotation."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional = type(None) in members
    for member in members:
        if get_origin(member) is Literal and isinstance(get_args(member)[0], str):
            return "str", optional, get_args(member)
        if isinstance(member, type) and issubclass(member, Enum):
            return "str", optional, tuple(choice.value for choice in member)
    origins = {get_origin(member) or member for member in members}
    kinds: tuple[tuple[type, Kind], ...] = (
        (list, "list"),
        (dict, "dict"),
        (bool, "bool"),
        (int, "int"),
        (float, "float"),
    )
    return next((kind for origin, kind in kinds if origin in origins), "str"), optional, ()
