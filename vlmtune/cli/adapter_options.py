"""The command lines of eval, predict and export.

Each command has options of its own, and takes some settings of training, which replace the values that the
adapter was trained with.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, cast, get_args

from vlmtune.cli.command_parser import CommandParser
from vlmtune.config.flag_table import ALIASES, find_flag, read_values
from vlmtune.config.help_text import first_sentence
from vlmtune.config.kinds import SEVERAL
from vlmtune.config.synonyms import SYNONYMS_OF_ANSWERING, advice
from vlmtune.errors import ConfigError, nearest
from vlmtune.evaluation.metrics import METRICS
from vlmtune.evaluation.options import (
    DEFAULT_NEW_TOKENS,
    STATE_DICT_FILE,
    EvaluateOptions,
    EvaluateOverrides,
    ExportOptions,
    ModelOverrides,
    PredictionFormat,
    PredictOptions,
    PredictOverrides,
    Split,
)


class AdapterParser(CommandParser):
    """Parses the command line of a command that takes `--adapter` and `--output_dir`."""

    def __init__(self, description: str, prog: str) -> None:
        super().__init__(description, prog)
        self.settings_flags: list[str] = []
        self.add_argument(
            "--adapter", metavar="DIR", help="Folder of a trained adapter, of train.py, tune.py or PEFT."
        )

    def add_switch(self, group: Any, name: str, text: str) -> None:
        """Add a switch that is off by default to this parser or a group of it."""
        group.add_argument(f"--{name}", action="store_true", help=text)

    def add_new_tokens(self) -> None:
        self.add_argument(
            "--max_new_tokens",
            type=_at_least_1,
            default=DEFAULT_NEW_TOKENS,
            help="Longest answer in tokens.",
        )

    def add_settings(self, *names: str) -> None:
        """Add settings of training by flag name."""
        for name in names:
            flag = find_flag(name)
            nargs: dict[str, Any] = {"nargs": "?", "const": "true"} if flag.kind == "bool" else {}
            if flag.kind in SEVERAL:
                nargs = {"nargs": "+"}
            self.add_argument(
                f"--{name}",
                metavar=flag.kind.upper(),
                default=argparse.SUPPRESS,
                help=first_sentence(flag.help).replace("%", "%%"),
                **nargs,
            )
            self.settings_flags.append(name)

    def parse(
        self, argv: Sequence[str] | None, *, needs_output: bool = True
    ) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Parse the command line. `--help` exits with 0.

        Returns:
            The command's own options, and the settings that are given, typed, by flag name.

        Raises:
            ConfigError: an option is unknown or wrong, or --adapter or --output_dir is missing.
        """
        given_words = sys.argv[1:] if argv is None else list(argv)
        as_given = {with_underscores(word): word for word in given_words}
        parsed, unknown = self.parse_known_args([*map(with_underscores, given_words)])
        if unknown:
            first = as_given.get(unknown[0], unknown[0]).partition("=")[0]
            word = first.lstrip("-").replace("-", "_")
            if text := advice(word, {*vars(parsed), *self.settings_flags}, SYNONYMS_OF_ANSWERING):
                raise ConfigError(f"{first}: {text}")
            known = ["adapter", *(name for name in vars(parsed)), *self.settings_flags]
            raise ConfigError(
                f"{first}: this command has no such option{nearest(ALIASES.get(word, word), known)}"
            )
        if parsed.adapter is None:
            raise ConfigError(
                "--adapter is missing: give the folder of a trained adapter, such as out/demo/best"
            )
        if needs_output and "output_dir" not in parsed:
            raise ConfigError("--output_dir is missing: give a folder for the results")
        given = {name: vars(parsed)[name] for name in self.settings_flags if name in parsed}
        return parsed, read_values(given, "--")


def with_underscores(word: str) -> str:
    """A word of the command line, where a flag's dashes become underscores: `--data_path=X`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def parse_evaluate(argv: Sequence[str] | None, description: str, prog: str) -> EvaluateOptions:
    """The options of `eval`. Raises ConfigError, see `AdapterParser.parse`."""
    parser = AdapterParser(description, prog)
    which = parser.add_mutually_exclusive_group()
    parser.add_switch(which, "base_only", "Evaluate the base model alone, without the adapter.")
    parser.add_switch(which, "compare_base", "Evaluate the base model too, on the same rows.")
    parser.add_argument(
        "--split",
        choices=get_args(Split),
        help="Rows to evaluate. By default test, those of the adapter's data that no search saw, or all rows "
        "of other data.",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"Metrics with commas between them, of {', '.join(METRICS)}. By default all.",
    )
    parser.add_new_tokens()
    parser.add_settings("output_dir", "data_path", *EvaluateOverrides.__annotations__)
    options, flags = parser.parse(argv)
    names = METRICS if options.metrics is None else (name.strip() for name in options.metrics.split(","))
    return EvaluateOptions(
        adapter=options.adapter,
        output_dir=flags.pop("output_dir"),
        data_path=flags.pop("data_path", None),
        split=options.split,
        metrics=tuple(names),
        base_only=options.base_only,
        compare_base=options.compare_base,
        max_new_tokens=options.max_new_tokens,
        overrides=cast(EvaluateOverrides, flags),
    )


def parse_predict(argv: Sequence[str] | None, description: str, prog: str) -> PredictOptions:
    """The options of `predict`. Raises ConfigError, see `AdapterParser.parse`."""
    parser = AdapterParser(description, prog)
    parser.add_argument("--question", help="Asked about every image of --data_path, a folder of images.")
    parser.add_switch(parser, "base_only", "Let the base model answer, without the adapter.")
    parser.add_argument(
        "--format",
        choices=get_args(PredictionFormat),
        default="jsonl",
        help="File that the answers are written to.",
    )
    parser.add_new_tokens()
    parser.add_settings("output_dir", "data_path", *PredictOverrides.__annotations__)
    options, flags = parser.parse(argv)
    if flags.get("data_path") is None:
        raise ConfigError(
            "--data_path is missing: give a folder of images with --question, or a file or folder of rows"
        )
    if not isinstance(flags["data_path"], str):
        raise ConfigError("--data_path: predict answers the rows of one file or folder; give one")
    return PredictOptions(
        adapter=options.adapter,
        data_path=flags.pop("data_path"),
        output_dir=flags.pop("output_dir"),
        question=options.question,
        base_only=options.base_only,
        format=options.format,
        max_new_tokens=options.max_new_tokens,
        overrides=cast(PredictOverrides, flags),
    )


def parse_export(argv: Sequence[str] | None, description: str, prog: str) -> ExportOptions:
    """The options of `export`. Raises ConfigError, see `AdapterParser.parse`."""
    parser = AdapterParser(description, prog)
    parser.add_switch(
        parser,
        "merge",
        "Write the base with the adapter merged into it; --quantization nf4 or int8 makes it smaller.",
    )
    parser.add_switch(parser, "state_dict", f"Write the adapter's tensors as {STATE_DICT_FILE}.")
    parser.add_settings("output_dir", *ModelOverrides.__annotations__)
    options, flags = parser.parse(argv)
    return ExportOptions(
        adapter=options.adapter,
        output_dir=flags.pop("output_dir"),
        merge=options.merge,
        state_dict=options.state_dict,
        overrides=cast(ModelOverrides, flags),
    )


def _at_least_1(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
