"""From the command line and a YAML file to one checked, picklable `Settings`; every mistake is a
`ConfigError` of one plain line."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

from vlmtune.compat.argparse import actions_of
from vlmtune.config import yaml12
from vlmtune.config.arguments import (
    ALIASES,
    GROUPS,
    PRESET,
    DataArguments,
    ModelArguments,
    SearchArguments,
    TrainingArguments,
)
from vlmtune.config.flags import Flag, flag, flags
from vlmtune.config.limits import UNSUPPORTED
from vlmtune.errors import ConfigError

__all__ = ["DataArguments", "ModelArguments", "SearchArguments", "Settings", "TrainingArguments", "parse"]


@dataclass(frozen=True)
class Settings:
    """Every option of a run, as plain values: it pickles, compares, and needs no GPU to be made.

    `training` holds the fields of `TrainingArguments` by name. The worker makes TRL's own object from them,
    where the device is.
    """

    data: DataArguments
    model: ModelArguments
    search: SearchArguments
    training: dict[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from values by flag name; what is left out is at its default.

        Raises:
            ConfigError: a name is unknown or given under two names, or a value is wrong.
        """
        return _build(_read(values))

    def to_dict(self) -> dict[str, Any]:
        """The values that differ from the defaults, by flag name. `from_dict` makes equal settings of
        them."""
        return {name: self.get(name) for name, option in flags().items() if self.get(name) != option.default}

    def get(self, name: str) -> Any:
        """The value of an option by its flag name.

        Raises:
            ConfigError: there is no such option.
        """
        option = flag(name)
        return (
            self.training[option.name]
            if option.group is TrainingArguments
            else getattr(self._group(option), option.name)
        )

    def replace(self, **values: Any) -> "Settings":
        """These settings with some values changed, typed and checked as those of flags are.

        Raises:
            ConfigError: a name is unknown, or a value is wrong by itself or beside the others.
        """
        return _build({**{name: self.get(name) for name in flags()}, **_read(values)})

    def save(self, path: str | Path) -> None:
        """Write the YAML file that `--config` and `load` read back to equal settings."""
        Path(path).write_text(yaml12.dump(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Settings":
        """Settings from a YAML file, such as the config.yaml beside an adapter.

        Raises:
            ConfigError: the file is not there, does not parse, or holds a wrong name or value.
        """
        return _build(_read_file(str(path)))

    def _group(self, option: Flag) -> DataArguments | ModelArguments | SearchArguments:
        return next(group for group in (self.data, self.model, self.search) if type(group) is option.group)


def parse(argv: Sequence[str] | None = None, *, description: str = "") -> Settings:
    """Settings from a command line, and from the YAML file that its `--config` names; flags override the
    file.

    Where neither a file nor a model is given, the older instruction-tuning command's settings stand in
    (`arguments.PRESET`).
    `--help` prints and exits 0.

    Args:
        argv: the arguments without the program's name; those of this process by default.
        description: first lines of the help.

    Raises:
        ConfigError: anything about the command line or the file is wrong, or no data or no model is named.
    """
    given, config = _tokens(list(sys.argv[1:] if argv is None else argv), description)
    values = _read_file(config) if config is not None else {}
    values |= _read(given, "--")
    resumed = values.get("resume") is not None
    if resumed and len(values) > 1:
        other = "--config" if config is not None else f"--{next(name for name in values if name != 'resume')}"
        raise ConfigError(
            f"{other}: a run goes on with the settings that it was started with; give --resume alone"
        )
    if config is None and "model_name_or_path" not in values and not resumed:
        loads = values.keys() & {"load_in_4bit", "load_in_8bit"}
        values = {
            name: value for name, value in PRESET.items() if not (name == "quantization" and loads)
        } | values
    settings = _build(values)
    if settings.data.data_path is None and not resumed:
        raise ConfigError(
            "--data_path: no data is given; name a frames folder, a JSON, JSONL or Parquet file, or a dataset"
        )
    if settings.model.model_name_or_path is None and not resumed:
        raise ConfigError(
            f"{config}: model_name_or_path is missing; name the model to adapt, such as llava-hf/llava-1.5-7b-hf"
        )
    return settings


class _Parser(HfArgumentParser):
    """argparse as transformers sets it up, which only cuts a command line into names and texts: `Flag.read`
    knows the types."""

    def __init__(self, description: str) -> None:
        super().__init__(
            GROUPS,
            description=description,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE] [--option value ...]",
        )
        self.add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help="YAML file of options by name; flags override it.",
        )
        for action in actions_of(self):
            option = flags().get(action.dest)
            if option and action.nargs != 0:
                action.metavar = f"{{{','.join(option.choices)}}}" if option.choices else option.kind.upper()
                action.type, action.choices = None, None
                action.nargs = {"bool": "?", "list": "+"}.get(option.kind)
                action.const = True if option.kind == "bool" else None
            switched_off = any(
                text == f"--no_{action.dest}" for text in action.option_strings
            )  # has the help of what it switches off
            if action.dest in UNSUPPORTED or switched_off:
                action.help = argparse.SUPPRESS
        for (
            name,
            option,
        ) in (
            flags().items()
        ):  # transformers' parser makes these for switches that are on by default, not for auto
            if option.kind == "bool" and option.optional and name not in UNSUPPORTED:
                self.add_argument(
                    f"--no_{name}",
                    dest=name,
                    action="store_const",
                    const=False,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
        for alias, name in ALIASES.items():
            nargs = "+" if flags()[name].kind == "list" else None
            self.add_argument(
                f"--{alias}",
                nargs=nargs,
                metavar="...",
                help=f"Older name of {name}.",
                default=argparse.SUPPRESS,
            )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (--\w+)\S*", r"\1:", message))


def _tokens(argv: list[str], description: str) -> tuple[dict[str, Any], str | None]:
    """The options that a command line gives, as texts by name, and the file that `--config` names."""
    untouched = object()
    names = dict.fromkeys(flags(), untouched)
    parsed, unknown = _Parser(description).parse_known_args(argv, argparse.Namespace(**names))
    if unknown:
        first = unknown[0].partition("=")[0]
        if first.startswith("-"):
            flag(first.lstrip("-").replace("-", "_"), first)
        raise ConfigError(f"{first}: this word belongs to no option")
    given = {name: value for name, value in vars(parsed).items() if value is not untouched}
    files = given.pop("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config: given {len(files)} times ({', '.join(files)}); one file is read")
    return given, files[0] if files else None


def _read_file(path: str) -> dict[str, Any]:
    """The checked options of a YAML file."""
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
    return _read(options, f"{path}: ")


def _read(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The checked values by flag name. `prefix` stands before a name in messages."""
    read: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in values.items():
        option = flag(name, prefix + name)
        if option.name in said:
            raise ConfigError(
                f"{prefix}{name}: is another name of {said[option.name]}, which is given too; keep one"
            )
        said[option.name] = name
        read[option.name] = option.read(value, prefix + name)
    return read


def _build(values: Mapping[str, Any]) -> Settings:
    """Settings from checked values, checked against each other."""
    chosen: dict[type, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, option in flags().items():
        value = values.get(name, option.default)
        chosen[option.group][name] = list(value) if isinstance(value, list) else value
    settings = Settings(
        data=DataArguments(**chosen[DataArguments]),
        model=ModelArguments(**chosen[ModelArguments]),
        search=SearchArguments(**chosen[SearchArguments]),
        training=chosen[TrainingArguments],
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """What has to hold between several options."""
    data, model, training = settings.data, settings.model, settings.training
    held_out = (0.0 if data.eval_data_path else data.eval_fraction) + data.test_fraction
    if held_out >= 1:
        raise ConfigError(
            f"eval_fraction and test_fraction: together {held_out:g}, which leaves nothing to train on; they must stay below 1"
        )
    if model.load_in_4bit and model.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit: only one of them can be true")
    for load, meaning in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if getattr(model, load) and model.quantization not in (None, meaning):
            raise ConfigError(
                f"{load}: means quantization {meaning}, but quantization is {model.quantization}; keep one"
            )
    if model.llm_int8 and model.base_quantization != "int8":
        raise ConfigError(f"llm_int8: needs quantization int8, but quantization is {model.base_quantization}")
    if training["bf16"] and training["fp16"]:
        raise ConfigError("bf16 and fp16: only one of them can be true")
    if training["eval_strategy"] == "steps" and training["eval_steps"] is None:
        raise ConfigError(
            "eval_steps: has no value, but eval_strategy is steps; give a number of steps, or a share such as 0.25"
        )
