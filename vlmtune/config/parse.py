"""From a command line, and the YAML file that its `--config` names, to checked `Settings`.

Every mistake is a `ConfigError` of one plain line. Neither TRL nor transformers is imported.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vlmtune.config.flag_table import ALIASES, GROUPS, find_flag, flags, read_file, read_values
from vlmtune.config.flags import Flag
from vlmtune.config.settings import Settings, build
from vlmtune.errors import ConfigError

# Settings where neither a config file nor a model is given: those of the training script that vlmtune
# replaced, which was started with data alone.
PRESET: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "quantization": "int8",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
TITLES = {
    "run": "run",
    "data": "data",
    "model": "base model",
    "lora": "LoRA",
    "training": "training",
    "search": "search",
}


def parse(argv: Sequence[str] | None = None, *, description: str = "", prog: str | None = None) -> Settings:
    """Settings from a command line and the YAML file that its `--config` names; flags override the file.

    Where neither a file nor a model is given, the settings in `PRESET` are used. `--help` prints and exits 0.

    Args:
        argv: the arguments without the program's name; those of this process by default.
        description: first lines of the help.
        prog: the program as its user calls it, for the help.

    Raises:
        ConfigError: anything about the command line or the file is wrong, or no data or no model is named.
    """
    parser = FlagParser(description, prog)
    given, config = _split_command_line(list(sys.argv[1:] if argv is None else argv), parser)
    values = read_file(config) if config is not None else {}
    values |= read_values(given, "--")
    resumed = values.get("resume") is not None
    if resumed and len(values) > 1:
        other = "--config" if config is not None else f"--{next(name for name in values if name != 'resume')}"
        raise ConfigError(
            f"{other}: a run resumes with the settings that it was started with; give --resume alone"
        )
    if config is None and "model_name_or_path" not in values and not resumed:
        quantized = values.keys() & {"load_in_4bit", "load_in_8bit"}
        preset = {name: value for name, value in PRESET.items() if not (name == "quantization" and quantized)}
        values = preset | values
    settings = build(values)
    if settings.data.data_path is None and not resumed:
        raise ConfigError(
            "--data_path: no data is given; name a frames folder, a JSON, JSONL or Parquet file, or a dataset"
        )
    if settings.model.model_name_or_path is None and not resumed:
        raise ConfigError(
            f"{config}: model_name_or_path is missing; name the model to adapt, such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    return settings


class FlagParser(argparse.ArgumentParser):
    """Cuts a command line into names and texts: `Flag.read` knows the types."""

    def __init__(self, description: str, prog: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE] [--option value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help="YAML file of options by name; flags override it.",
        )
        for group in GROUPS:
            section = self.add_argument_group(TITLES[group]) if group in TITLES else self
            for flag in flags().values():
                if flag.group == group:
                    _add_flag(section, flag, hidden=group == "unsupported")
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


def _add_flag(section: "argparse._ActionsContainer", flag: Flag, *, hidden: bool) -> None:
    """Add an option's flag, also with dashes, and `--no_NAME` for a switch that can be on by default."""
    names = [f"--{flag.name}"]
    if "_" in flag.name:
        names.append(f"--{flag.name.replace('_', '-')}")
    shown = "auto" if flag.kind == "bool" and flag.default is None else flag.default
    text = f"{flag.help} (default: {shown})".replace("%", "%%")
    section.add_argument(
        *names,
        dest=flag.name,
        nargs={"bool": "?", "list": "+"}.get(flag.kind),
        const=True if flag.kind == "bool" else None,
        metavar=f"{{{','.join(flag.choices)}}}" if flag.choices else flag.kind.upper(),
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS if hidden else text,
    )
    if flag.kind == "bool" and (flag.optional or flag.default) and not hidden:
        section.add_argument(
            *(
                name.replace("--", "--no_" if "_" in name or name == names[0] else "--no-", 1)
                for name in names
            ),
            dest=flag.name,
            action="store_const",
            const=False,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _split_command_line(argv: list[str], parser: FlagParser) -> tuple[dict[str, Any], str | None]:
    """The options that a command line gives, as texts by name, and the file that `--config` names."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0].partition("=")[0]
        if first.startswith("-"):
            find_flag(first.lstrip("-").replace("-", "_"), first)
        raise ConfigError(f"{first}: unexpected argument; an option is written --name value")
    given = dict(vars(parsed))
    files = given.pop("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config: given {len(files)} times ({', '.join(files)}); one file is read")
    return given, files[0] if files else None
