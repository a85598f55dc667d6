"""Parse a command line, and the YAML file that its `--config` names, into checked `Settings`.

Every mistake is a `ConfigError` of one plain line. Neither TRL nor transformers is imported.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vlmtune.config.flag_table import ALIASES, GROUPS, find_flag, flags, read_file, read_values
from vlmtune.config.flags import Flag
from vlmtune.config.help_text import help_text
from vlmtune.config.kinds import SEVERAL
from vlmtune.config.settings import Settings, build
from vlmtune.errors import ConfigError

# Values of a command that names data and an output folder, but neither a config file nor a model.
PRESET: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "quantization": "int8",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def parse(
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    prog: str | None = None,
    search: bool = False,
    preset: bool = True,
) -> Settings:
    """Settings from a command line and the YAML file that its `--config` names; flags override the file.

    A command with `--data_path` and `--output_dir` but without a file or a model gets the values of `PRESET`.
    `--help` and `--help_all` print and exit 0.

    Args:
        argv: the arguments without the program's name; those of this process by default.
        description: first lines of the help.
        prog: the program as its user calls it, for the help.
        search: whether the command is a search, whose help shows the options of a search.
        preset: whether `PRESET` applies to the command.

    Raises:
        ConfigError: anything about the command line or the file is wrong, or no data or no model is named.
    """
    parser = FlagParser(description, prog, search=search)
    texts, config = _split_command_line(list(sys.argv[1:] if argv is None else argv), parser)
    values = read_file(config) if config is not None else {}
    values |= read_values(texts, "--")
    resumed = values.get("resume") is not None
    if resumed and values.get("overwrite"):
        raise ConfigError("--overwrite: would delete what --resume continues; give one of them")
    preset_applies = preset and config is None and {"data_path", "output_dir"} <= values.keys()
    if preset_applies and "model_name_or_path" not in values and not resumed:
        loads = values.keys() & {"load_in_4bit", "load_in_8bit"}
        chosen = {name: value for name, value in PRESET.items() if not (name == "quantization" and loads)}
        values = chosen | values
    settings = build(values)
    if settings.data.data_path is None and not resumed:
        raise ConfigError(
            "--data_path: no data is given; name a file or folder of any format in docs/data.md, or a dataset"
        )
    if settings.model.model_name_or_path is None and not resumed:
        missing = (
            f"{config}: model_name_or_path is missing"
            if config
            else "--model_name_or_path: no model is given"
        )
        raise ConfigError(f"{missing}; name the model to adapt, such as llava-hf/llava-1.5-7b-hf")
    return settings


class FlagParser(argparse.ArgumentParser):
    """Splits a command line into option names and texts. `Flag.read` then converts the texts."""

    def __init__(self, description: str, prog: str | None, *, search: bool) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=False)
        self.search = search
        self.add_argument("-h", "--help", action=_Help, everything=False)
        self.add_argument("--help_all", "--help-all", action=_Help, everything=True)
        self.add_argument(
            "--config",
            action="append",
        )
        for group in GROUPS:
            for flag in flags().values():
                if flag.group == group:
                    _add_flag(self, flag)
        for alias, name in ALIASES.items():
            nargs = "+" if flags()[name].kind in SEVERAL else None
            self.add_argument(
                f"--{alias}",
                nargs=nargs,
                default=argparse.SUPPRESS,
            )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (--\w+)\S*", r"\1:", message))


class _Help(argparse.Action):
    """Prints the help and exits 0."""

    def __init__(self, option_strings: list[str], dest: str, *, everything: bool) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0)
        self.everything = everything

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        assert isinstance(parser, FlagParser)
        usage = f"usage: {parser.prog} [--config FILE] [--option value ...]"
        text = help_text(usage, parser.description or "", search=parser.search, everything=self.everything)
        print(text, end="")
        parser.exit(0)


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """Add `--NAME`, its spelling with dashes, and `--no_NAME` for a switch that can be on by default."""
    names = [f"--{flag.name}"]
    if "_" in flag.name:
        names.append(f"--{flag.name.replace('_', '-')}")
    parser.add_argument(
        *names,
        dest=flag.name,
        nargs="+" if flag.kind in SEVERAL else "?" if flag.kind == "bool" else None,
        const=True if flag.kind == "bool" else None,
        default=argparse.SUPPRESS,
    )
    if flag.kind == "bool" and (flag.optional or flag.default) and flag.in_settings:
        parser.add_argument(
            *(
                name.replace("--", "--no_" if "_" in name or name == names[0] else "--no-", 1)
                for name in names
            ),
            dest=flag.name,
            action="store_const",
            const=False,
            default=argparse.SUPPRESS,
        )


def _split_command_line(argv: list[str], parser: FlagParser) -> tuple[dict[str, Any], str | None]:
    """The options of a command line as texts by name, and the file that `--config` names."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0].partition("=")[0]
        if first.startswith("-"):
            find_flag(first.lstrip("-").replace("-", "_"), first)
        raise ConfigError(f"{first}: unexpected argument; an option is written --name value")
    texts = dict(vars(parsed))
    files = texts.pop("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config: given {len(files)} times ({', '.join(files)}); one file is read")
    return texts, files[0] if files else None
