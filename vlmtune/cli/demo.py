"""`vlmtune demo`: write sample files, a small base model and configs, and run a search on them."""

import shutil
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from vlmtune.cli.command_parser import CommandParser
from vlmtune.cli.commands import tune
from vlmtune.config.parse import parse
from vlmtune.console import configure_console, console_line, say
from vlmtune.errors import ConfigError, plain_user_errors

DEMO_HELP = """Write sample files and a small trained model, and search the best adapter for them.

{prog}
{prog} --files_only
{prog} --output_dir demo --num_samples 8

A CPU is enough. Writes images of a mall, a small LLaVA and the shipped configs to --output_dir, and the
search's result to out/demo. Further options go to tune.
"""


def demo(argv: Sequence[str] | None = None, prog: str = "vlmtune demo") -> None:
    """`demo`: write the demo's files and run its search. Arguments as in `commands.tune`."""
    configure_console()
    with plain_user_errors():
        parser = CommandParser(DEMO_HELP.format(prog=prog), prog)
        parser.add_argument("--output_dir", default="demo", help="Folder of the sample files. (demo)")
        parser.add_argument("--files_only", action="store_true", help="Write the files, and search nothing.")
        options, others = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        folder = Path(options.output_dir)
        parse([*own_paths(folder), *others], search=True)  # a mistake is reported before anything is written
        say(f"Writing sample files to {folder} …")
        write_files(folder)
    if options.files_only:
        config = folder / "configs" / "demo.yaml"
        say(console_line("Next", f"vlmtune tune --config {config} {' '.join(own_paths(folder))}"))
        return
    tune(["--config", f"{folder}/configs/demo.yaml", *own_paths(folder), *others], prog="vlmtune tune")


def own_paths(folder: Path) -> list[str]:
    """The options that make the demo's config use the files in `folder`."""
    return ["--data_path", f"{folder}/mall", "--model_name_or_path", f"{folder}/llava"]


def write_files(folder: Path) -> None:
    """Write samples, model and configs; existing files stay.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    from vlmtune.demo.__main__ import main

    if main(["--output_dir", str(folder)]):
        raise ConfigError(f"--output_dir {folder}: the demo's files could not be written")
    (folder / "configs").mkdir(exist_ok=True)
    with as_file(files("vlmtune.demo").joinpath("configs")) as shipped:
        for path in shipped.glob("*.yaml"):
            if not (folder / "configs" / path.name).exists():
                shutil.copyfile(path, folder / "configs" / path.name)
