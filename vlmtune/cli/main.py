"""The console script `vlmtune`: one program for all commands."""

import sys
from collections.abc import Callable, Sequence

from vlmtune import __version__
from vlmtune.cli import commands
from vlmtune.cli.chat import CHAT_HELP, chat
from vlmtune.cli.demo import DEMO_HELP, demo
from vlmtune.cli.ui import UI_HELP, ui
from vlmtune.errors import USER_ERROR, nearest

Command = Callable[[Sequence[str], str], None]
COMMANDS: dict[str, tuple[Command, str]] = {
    "tune": (commands.tune, commands.TUNE_HELP),
    "train": (commands.train, commands.TRAIN_HELP),
    "eval": (commands.evaluate, commands.EVALUATE_HELP),
    "predict": (commands.predict, commands.PREDICT_HELP),
    "export": (commands.export, commands.EXPORT_HELP),
    "chat": (chat, CHAT_HELP),
    "ui": (ui, UI_HELP),
    "demo": (demo, DEMO_HELP),
    "inspect": (commands.inspect, commands.INSPECT_HELP),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `vlmtune COMMAND [--option value ...]`.

    Exits with 0 after `--help` and `--version`, with 2 for an unknown command, and as the command does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"vlmtune {__version__}")
    elif name in COMMANDS:
        COMMANDS[name][0](arguments[1:], f"vlmtune {name}")
    else:
        print(f"error: {name}: there is no such command{nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(USER_ERROR)


def overview() -> str:
    """The list of commands, with the first line of each one's help."""
    lines = [f"  {name:<9}{text.partition(chr(10))[0]}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vlmtune COMMAND [--option value ...]",
            "",
            *lines,
            "",
            "vlmtune COMMAND --help lists the options of a command.",
        ]
    )
