"""The table of all flags, and the reading of values by flag name from a command line, a YAML file or code."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from vlmtune.config import yaml12
from vlmtune.config.flags import UNSUPPORTED_GROUP, Flag
from vlmtune.config.kinds import kind_of_hint
from vlmtune.config.limits import UNSUPPORTED
from vlmtune.config.options import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
)
from vlmtune.config.search_options import SearchSettings
from vlmtune.config.synonyms import advice
from vlmtune.config.training_options import TrainingSettings
from vlmtune.config.trl_flags import TrlUnsupported
from vlmtune.errors import ConfigError, nearest

# Names of other programs (on the left) that are accepted like the flag's own name.
ALIASES = {"max_seq_length": "max_length", "lora_rank": "lora_r", "target_modules": "lora_target_modules"}

# In the order of `--help`.
GROUPS: dict[str, type[Any]] = {
    "data": DataSettings,
    "run": RunSettings,
    "model": ModelSettings,
    "lora": LoraSettings,
    "training": TrainingSettings,
    "search": SearchSettings,
    UNSUPPORTED_GROUP: TrlUnsupported,
}


@cache
def flags() -> dict[str, Flag]:
    """Every flag by its name, in the order of GROUPS."""
    table: dict[str, Flag] = {}
    for group, options in GROUPS.items():
        hints = get_type_hints(options)
        for field in dataclasses.fields(options):
            kind, optional, choices = kind_of_hint(hints[field.name])
            name = field.metadata.get("flag", field.name)
            table[name] = Flag(
                name=name,
                group=group,
                field=field.name,
                kind=field.metadata.get("kind", kind),
                optional=optional,
                choices=tuple(field.metadata.get("choices", choices)),
                default=default_of(field),
                help=field.metadata.get("help", ""),
            )
    return table


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """A field's default value. A list or dict is a new object at each call."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def find_flag(name: str, label: str | None = None) -> Flag:
    """The flag called `name`, which may be one of ALIASES.

    Args:
        label: how to call the flag in a message; `name` by default.

    Raises:
        ConfigError: there is no such flag; the message names the most similar one.
    """
    flag = flags().get(ALIASES.get(name, name))
    if flag is None:
        if (text := advice(name, flags().keys() - UNSUPPORTED.keys())) is not None:
            raise ConfigError(f"{label or name}: {text}")
        names = [known for known in flags() if known not in UNSUPPORTED] + list(ALIASES)
        raise ConfigError(f"{label or name}: there is no such option{nearest(name, names)}")
    return flag


def read_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check values, and convert them to the types of their flags.

    Args:
        prefix: what messages put before a name, such as "--" or "config.yaml: ".

    Raises:
        ConfigError: a name is unknown or given under two names, or a value is wrong.
    """
    checked: dict[str, Any] = {}
    names: dict[str, str] = {}  # as they were given
    for name, value in values.items():
        flag = find_flag(name, prefix + name)
        if flag.name in names:
            raise ConfigError(
                f"{prefix}{name}: is another name of {names[flag.name]}, which is given too; keep one"
            )
        names[flag.name] = name
        checked[flag.name] = flag.read(value, prefix + name)
    return checked


def read_file(path: str) -> dict[str, Any]:
    """The checked options of a YAML file, by flag name.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, or holds a wrong name or value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        options = yaml12.load_options(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except yaml12.YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if options is None:
        raise ConfigError(f"{path}: must hold options by name, such as `lora_r: 8`, one a line")
    return read_values(options, f"{path}: ")
