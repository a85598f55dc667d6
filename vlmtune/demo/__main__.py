"""python -m vlmtune.demo [--output_dir demo] [--family llava mllama smolvlm qwen2_5_vl]

Write sample files and tiny models to try vlmtune on: a LLaVA that was trained on other pictures, the other
families with random weights.
What is already there and whole stays as it is.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vlmtune.demo.scenes import write_instructions, write_mall
from vlmtune.demo.trained import write_trained_llava
from vlmtune.errors import UserError

FRAMES = 800  # 3 ms each
FAMILIES = ("llava", "mllama", "smolvlm", "qwen2_5_vl")


def main(arguments: list[str] | None = None) -> int:
    """Write what `arguments` (by default the command line) ask for and return the exit code: 0, or 2 where
    something cannot be written."""
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
        mall = partial(write_mall, frames=FRAMES)
        _write(
            folder / "mall",
            "labels.csv",
            mall,
            f"{FRAMES} pictures of a mall with the number of people in them",
        )
        _write(
            folder / "instructions.jsonl",
            "",
            write_instructions,
            "60 questions and answers about construction terms",
        )
        for family in options.family:
            what = (
                "a small trained llava model"
                if family == "llava"
                else f"a tiny {family} model with random weights"
            )
            _write(folder / family, "config.json", partial(_write_model, family), what)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--output_dir {folder}: cannot be written to ({error}).", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, last: str, write: Callable[[Path], None], what: str) -> None:
    """Call `write` unless `path` has the file that is written `last`, and say which of the two was done."""
    if (path / last).exists():
        print(f"{path}: already there")
    else:
        write(path)
        print(f"{path}: wrote {what}")


def _write_model(family: str, folder: Path) -> None:
    if family == "llava":
        write_trained_llava(folder)
        return
    from transformers.utils import logging  # takes seconds to import: only where a model is to be written

    from vlmtune.demo.models import write_model

    logging.disable_progress_bar()
    write_model(family, folder)


if __name__ == "__main__":
    sys.exit(main())
