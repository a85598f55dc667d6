"""Write `trl_flags.py`: TRL's training options as plain dataclasses, to check arguments without TRL.

`make flags` runs it; a test compares the file with the installed TRL and transformers.
"""

import dataclasses
import json
import textwrap
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune.config.kinds import kind_of_hint
from vlmtune.config.limits import UNSUPPORTED

TARGET = Path(__file__).with_name("trl_flags.py")
# Options of TRL that are in another group of vlmtune's settings than training.
IN_OTHER_GROUPS = ("output_dir", "use_cpu", "trust_remote_code", "load_best_model_at_end")
# Refused options whose only accepted value is not TRL's default.
REFUSED_DEFAULTS: dict[str, Any] = {"use_peft": True, "remove_unused_columns": False, "save_strategy": "no"}
KINDS: dict[str, type[Any] | tuple[type[Any], ...]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": (list, str),
    "dict": dict,
    "pairs": dict,
    "paths": (list, str),
    "numbers": list,
}
HEAD = '''"""TRL's training options, by `make flags` from trl {trl} and transformers {transformers}."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrlTraining:
    """The options of `trl.SFTConfig` that vlmtune passes on, with TRL's names, types and defaults."""

{training}


@dataclass(frozen=True)
class TrlUnsupported:
    """The options of `trl.SFTConfig` and `trl.ModelConfig` that vlmtune takes with these values only."""

{unsupported}
'''


def main() -> None:
    TARGET.write_text(text(), encoding="utf-8")
    print(f"wrote {TARGET}")


def text() -> str:
    """The content of `trl_flags.py` for the installed TRL and transformers."""
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    hints: dict[str, Any] = {}
    options: dict[str, dataclasses.Field[Any]] = {}
    for group in (SFTConfig, ModelConfig):
        hints |= _hints(group)
        options |= {option.name: option for option in dataclasses.fields(group) if option.init}
    sft_options = [option.name for option in dataclasses.fields(SFTConfig) if option.init]
    kept = [name for name in sft_options if name not in UNSUPPORTED and name not in IN_OTHER_GROUPS]
    unsupported = [name for name in options if name in UNSUPPORTED]
    return HEAD.format(
        trl=version("trl"),
        transformers=version("transformers"),
        training="\n".join(_field(options[name], hints[name], help_text=True) for name in kept),
        unsupported="\n".join(_field(options[name], hints[name], help_text=False) for name in unsupported),
    )


def _hints(group: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(group)


def _field(option: "dataclasses.Field[Any]", hint: Any, *, help_text: bool) -> str:
    kind, optional, choices = kind_of_hint(hint)
    default = REFUSED_DEFAULTS.get(option.name, plain_default(option))
    optional = optional or default is None
    if kind == "float" and default is not None:
        default = float(default)
    if not isinstance(default, KINDS[kind]) and default is not None:
        kind = "str"  # such as TRL's own word for "decide by the device"
    name = {"list": "list[str] | str", "dict": "dict[str, Any]"}.get(kind, kind) + (
        " | None" if optional else ""
    )
    metadata: list[str] = []
    if help_text and option.metadata.get("help"):
        words = " ".join(str(option.metadata["help"]).replace("%%", "%").split())
        metadata.append(f'"help": {_wrapped(words)}')
    if chosen := tuple(option.metadata.get("choices", choices)):
        metadata.append(f'"choices": {json.dumps(chosen)}')
    if isinstance(default, list | dict):
        value = f"default_factory=lambda: {default!r}" if default else f"default_factory={kind}"
    else:
        value = f"default={default!r}"
    inside = f", metadata={{{', '.join(metadata)}}}" if metadata else ""
    return f"    {option.name}: {name} = field({value}{inside})"


def _wrapped(words: str) -> str:
    lines = textwrap.wrap(words, 80)
    literals = [
        json.dumps(line + (" " if number < len(lines) - 1 else "")) for number, line in enumerate(lines)
    ]
    return literals[0] if len(literals) == 1 else "(" + " ".join(literals) + ")"


def plain_default(option: "dataclasses.Field[Any]") -> Any:
    """A field's default as a plain value: the string of an enum, a fresh list."""
    default = (
        option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default
    )
    return default.value if isinstance(default, Enum) else default


if __name__ == "__main__":
    main()
