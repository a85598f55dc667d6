"""The command lines of eval.py, predict.py and export.py: some options of their own and some of training,
over the adapter's settings."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vlmtune.compat.argparse import actions_of
from vlmtune.config.flag_table import ALIASES, flag
from vlmtune.errors import ConfigError, nearest

# Options of training that tell which base is loaded and how, and how many rows go through it at once.
BASE = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "quantization",
    "dtype",
    "attn_implementation",
    "use_bnb_nested_quant",
    "llm_int8",
    "use_cpu",
)
DATA = (
    "data_path",
    "image_root",
    "group_by",
    "on_bad_row",
    "allow_outside_paths",
    "allow_remote_images",
    "cache_dir",
    "cache_size_gb",
    "no_cache",
    "storage_path",
)
RUN = ("per_device_eval_batch_size", "output_dir", "overwrite")
NEW_TOKENS = 64


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (--\w+)\S*", r"\1:", message).replace("::", ":"))


def read(
    argv: Sequence[str],
    description: str,
    shared: Sequence[str],
    add: Callable[[argparse.ArgumentParser], Any],
) -> tuple[argparse.Namespace, dict[str, str]]:
    """A command line's own options, and those of `shared`, options of training, that it gives, as texts by
    name. `--help` exits 0.

    Raises:
        ConfigError: an option is unknown or without its value, or there is no --adapter or --output_dir.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="Folder of a trained adapter, of train.py, tune.py or PEFT."
    )
    add(parser)
    for name in shared:
        kind = flag(name).kind
        nargs: dict[str, Any] = {"nargs": "?", "const": "true"} if kind == "bool" else {}
        dashed = [f"--{name.replace('_', '-')}"] if "_" in name else []
        parser.add_argument(
            f"--{name}",
            *dashed,
            metavar=kind.upper(),
            default=argparse.SUPPRESS,
            help=flag(name).help,
            **nargs,
        )
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        known = [action.dest for action in actions_of(parser)]
        raise ConfigError(
            f"{unknown[0].partition('=')[0]}: this command has no such option{nearest(ALIASES.get(word, word), known)}"
        )
    given = {name: str(vars(parsed)[name]) for name in shared if name in vars(parsed)}
    if parsed.adapter is None:
        raise ConfigError("--adapter is missing: give the folder of a trained adapter, such as out/demo/best")
    if "output_dir" not in given:
        raise ConfigError("--output_dir is missing: give a folder for the results")
    return parsed, given


def at_least_1(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
