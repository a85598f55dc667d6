"""Try families and print a table.

PYTHONPATH=.:tests python -m families.table [--work FOLDER] [--markdown docs/models.md] [NAME …]

With --markdown, the table in that file is written anew between its two marks.
"""

import argparse
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from families.builders import FAMILIES, build
from families.cases import write_rows
from families.checks import CHECKS, Outcome, Trial
from families.kit import Subject

BEGIN, END = "<!-- families.table writes from here -->", "<!-- to here -->"
LIBRARIES = ("torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes")
HEADS = {
    "labels": "labels",
    "loss": "loss",
    "training": "NF4 run",
    "stock": "equals TRL",
    "packed": "packed",
    "equal": "packed equals isolated",
    "predict": "predict",
    "merge": "merge",
}


def markdown(marks: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, from each family's mark of each check."""
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    lines = [
        f"With {versions}, on a CPU:",
        "",
        "| family | " + " | ".join(HEADS.values()) + " |",
        "|---" * (len(HEADS) + 1) + "|",
    ]
    for name, row in sorted(marks.items()):
        if all(row[check] in ("p", "–") for check in ("labels", "training")):
            lines.append(f"| `{name}` | refused in one line |" + " |" * (len(HEADS) - 1))
        else:
            words = [{"p": "refused"}.get(row[check], row[check]) for check in HEADS]
            lines.append(f"| `{name}` | " + " | ".join(words) + " |")
    return "\n".join(lines)


def write_markdown(file: Path, marks: dict[str, dict[str, str]]) -> None:
    """Replace the table in a file."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n\n{markdown(marks)}\n\n{END}{after}", encoding="utf-8")


def try_family(name: str, work: Path) -> Trial:
    model = work / "models" / name
    build(name, model)
    rows = write_rows(work / "rows")
    trial = Trial(FAMILIES[name], Subject(model, rows, work / "runs" / name))
    for check, run in CHECKS.items():
        if check == "loss" and trial.outcomes["labels"].state not in ("ok", "wrong"):
            trial.outcomes[check] = Outcome("skipped")
        else:
            trial.check(check, run)
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work")
    parser.add_argument("--markdown")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from vlmtune.cluster import connect

    connect()
    work = Path(options.work or tempfile.mkdtemp(prefix="families-"))
    print(f"{'family':20} " + " ".join(f"{name:9}" for name in CHECKS), flush=True)
    table: dict[str, dict[str, str]] = {}
    for name in options.names or FAMILIES:
        began = time.monotonic()
        trial = try_family(name, work)
        table[name] = {check: outcome.mark for check, outcome in trial.outcomes.items()}
        marks = " ".join(f"{outcome.mark:9}" for outcome in trial.outcomes.values())
        print(f"{name:20} {marks} {time.monotonic() - began:.0f} s", flush=True)
        for check, outcome in trial.outcomes.items():
            if outcome.detail and not options.quiet and check not in ("predict", "merge"):
                print(f"      {check}: {outcome.detail[:600]}", flush=True)
    if options.markdown:
        write_markdown(Path(options.markdown), table)


if __name__ == "__main__":
    main()
