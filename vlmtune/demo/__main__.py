"""python -m vlmtune.demo [--output_dir demo] [--family llava mllama smolvlm qwen2_5_vl]

Write sample files and tiny models to try vlmtune on. The LLaVA was trained on other images; the models of
other families have random weights. Files and models that exist already stay as they are.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vlmtune.demo.instructions import write_instructions
from vlmtune.demo.mall import write_mall
from vlmtune.demo.trained import write_trained_llava
from vlmtune.errors import UserError

FRAMES = 800  # drawing one takes 3 ms
FAMILIES = ("llava", "mllama", "smolvlm", "qwen2_5_vl")


def main(arguments: list[str] | None = None) -> int:
    """Write what `arguments` (by default the command line) ask for.

    Returns:
        The exit code: 0, or 2 if something cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlmtune.demo",
        description="Write sample files and tiny models to try vlmtune on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="folder to write to (default: demo)"
    )
    parser.add_argument(
        "--family",
        nargs="+",
        choices=FAMILIES,
        default=["llava"],
        help="tiny models to write (default: llava)",
    )
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir
    try:
        content = f"{FRAMES} images of a mall with the number of people in them"
        _write(folder / "mall", "labels.csv", partial(write_mall, frames=FRAMES), content)
        content = "60 questions and answers about construction terms"
        _write(folder / "instructions.jsonl", "", write_instructions, content)
        for family in options.family:
            content = f"a tiny {family} model with random weights"
            if family == "llava":
                content = "a small trained llava model"
            _write(folder / family, "config.json", partial(_write_model, family), content)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--output_dir {folder}: cannot be written to ({error}).", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, last_file: str, write: Callable[[Path], None], content: str) -> None:
    """Call `write` unless `path` has the file that it writes last; print which of the two was done."""
    if (path / last_file).exists():
        print(f"{path}: already there")
    else:
        write(path)
        print(f"{path}: wrote {content}")


def _write_model(family: str, folder: Path) -> None:
    if family == "llava":
        write_trained_llava(folder)
        return
    from transformers.utils import logging  # takes seconds to import

    from vlmtune.demo.models import write_model

    logging.disable_progress_bar()
    write_model(family, folder)


if __name__ == "__main__":
    sys.exit(main())
