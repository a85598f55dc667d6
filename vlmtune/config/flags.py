"""`Flag`: one option, with its type and limits; it reads values from a command line, YAML or code."""

import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from vlmtune.config.kinds import Kind
from vlmtune.config.limits import LIMITS, UNSUPPORTED
from vlmtune.config.yaml12 import YamlError, load_value
from vlmtune.errors import ConfigError, nearest

UNSUPPORTED_GROUP = "unsupported"
_TRUE = ("true", "yes", "t", "y", "1")
_FALSE = ("false", "no", "f", "n", "0")
_NONE_WORDS = ("none", "null", "~", "")


@dataclass(frozen=True)
class Flag:
    """One option, under its flag name.

    Attributes:
        name: the flag's name, without dashes.
        group: the group of settings that holds it, such as "lora"; UNSUPPORTED_GROUP for an option of TRL
            that vlmtune does not take.
        field: its name in that group, such as "r" for the flag `lora_r`.
        kind: the kind of its values, see `kinds`.
        optional: whether None is one of its values.
        choices: the allowed values; empty if any value of the kind is allowed.
        help: its description in `--help`.
    """

    name: str
    group: str
    field: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...]
    default: Any
    help: str = ""

    @property
    def in_settings(self) -> bool:
        """Whether `Settings` has a field for it. An option of TRL without one can only have its default."""
        return self.group != UNSUPPORTED_GROUP

    def read(self, value: Any, label: str) -> Any:
        """Convert `value` to this option's type and check it.

        Args:
            value: a string from the command line or YAML, or a value of the option's own type.
            label: how to call the option in a message, such as "--lora_r" or "config.yaml: lora_r".

        Raises:
            ConfigError: it is of another type, not among the choices, out of limits, or not supported.
        """
        if self.name in UNSUPPORTED:
            return self._read_refused(value, label)
        read = self._typed(value, label)
        for one in (read if isinstance(read, list) else [read]) if self.choices else ():
            if one is not None and one not in self.choices:
                raise ConfigError(
                    f"{label}: {_show(value if one == read else one)} is not one of "
                    f"{', '.join(self.choices)}{nearest(str(one), self.choices)}"
                )
        limit = LIMITS.get(self.name)
        if limit and read is not None and not limit.holds(read):
            raise ConfigError(f"{label}: {_show(value)} must be {limit.text}")
        if self.name == "num_workers":
            _check_workers(read, label)
        return read

    def _read_refused(self, value: Any, label: str) -> Any:
        # The value is not shown: it may be a token.
        error = ConfigError(
            f"{label}: vlmtune does not take this option: {UNSUPPORTED[self.name]}. Leave it out"
        )
        if value != self.default:
            try:
                value = self._typed(value, label)
            except ConfigError:
                raise error from None
        if value != self.default:
            raise error
        return value

    def _typed(self, value: Any, label: str) -> Any:
        text = value.strip() if isinstance(value, str) else None
        # For a switch, None means that vlmtune decides.
        none_words = (*_NONE_WORDS, "auto") if self.kind == "bool" else _NONE_WORDS
        if value is None or (
            self.optional and text is not None and text.lower() in none_words and text not in self.choices
        ):
            if self.optional:
                return None
            raise ConfigError(f"{label}: has no value; {_EXPECTED[self.kind]} is needed")
        match self.kind:
            case "bool" if isinstance(value, bool):
                return value
            case "bool" if text is not None and text.lower() in _TRUE + _FALSE:
                return text.lower() in _TRUE
            case "int" if isinstance(value, int) and not isinstance(value, bool):
                return value
            case "int" if text is not None and re.fullmatch(r"[-+]?\d{1,18}", text):
                return int(text)
            case "float" if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and abs(value) <= sys.float_info.max
            ):
                return float(value)
            case "float" if text is not None and (number := _number(text)) is not None:
                return number
            case "str" if isinstance(value, str):
                return value
            case "str" if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            case "list":
                return self._list(value, label)
            case "dict":
                return self._dict(value, label)
            case "pairs":
                return self._pairs(value, label)
            case "paths":
                return self._paths(value, label)
            case "numbers":
                return self._numbers(value, label)
        raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED[self.kind]}")

    def _list(self, value: Any, label: str) -> list[str] | str:
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED['list']}")
        if len(parts) == 1 and (parts[0] == "all-linear" or set(parts[0]) & set(r"()[]{}|*+?\^$")):
            # A pattern, or PEFT's word for every linear layer. PEFT tells them from names by the type str.
            return str(parts[0])
        names = [name.strip() for part in parts for name in part.split(",")]
        if not names or not all(names):
            raise ConfigError(f"{label}: {_show(value)} has an empty name in it")
        return names

    def _pairs(self, value: Any, label: str) -> dict[str, str]:
        if isinstance(value, dict):
            pairs = list(value.items())
        else:
            parts = value if isinstance(value, list | tuple) else [value]
            pairs = [part.partition("=")[::2] if isinstance(part, str) else (None, None) for part in parts]
        for name, text in pairs:
            if not (isinstance(name, str) and isinstance(text, str) and name.strip() and text.strip()):
                raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED['pairs']}")
        names = [name.strip() for name, _ in pairs]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{label}: {doubled} is given twice; keep one")
        return {name.strip(): text.strip() for name, text in pairs}

    def _paths(self, value: Any, label: str) -> str | list[str]:
        paths = list(value) if isinstance(value, list | tuple) else [value]
        if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
            raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED['paths']}")
        return str(paths[0]) if len(paths) == 1 else paths

    def _numbers(self, value: Any, label: str) -> list[float]:
        parts = value if isinstance(value, list | tuple) else [value]
        numbers = [
            float(part)
            if isinstance(part, int | float) and not isinstance(part, bool)
            else _number(str(part))
            for part in parts
        ]
        if not all(number is not None and number > 0 for number in numbers):
            raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED['numbers']}")
        return [number for number in numbers if number is not None]

    def _dict(self, value: Any, label: str) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = load_value(value)
            except YamlError as error:
                raise ConfigError(f"{label}: {_show(value)} does not parse: {error}") from None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{label}: {_show(value)} is not {_EXPECTED['dict']}")
        return value


_EXPECTED: dict[Kind, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a name or a list of names, as in q_proj,k_proj",
    "pairs": "names with their values, as in image=photo answer=label",
    "paths": "a file, a folder or a name, or several",
    "numbers": "a list of numbers above 0, as in 0.7 0.3",
    "dict": 'a mapping of names to values, on the command line as in {"name": 1}',
}


def _number(text: str) -> float | None:
    """`text` as a finite number; None if it is not one."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _check_workers(text: str, label: str) -> None:
    low, colon, high = text.partition(":")
    whole = low.isdecimal() and (high.isdecimal() if colon else True)
    if not whole or (colon and not 1 <= int(low) <= int(high)):
        raise ConfigError(
            f"{label}: {_show(text)} is neither a number of workers, such as 2, nor a range with the smaller "
            "first, such as 2:8"
        )


def _show(value: Any) -> str:
    """`value` as its writer would recognize it, on one line of at most 80 characters."""
    try:
        shown = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except TypeError:
        shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
