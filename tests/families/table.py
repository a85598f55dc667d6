"""Try families and print a table.

PYTHONPATH=.:tests python -m families.table [--work FOLDER] [NAME …]
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch

from families.builders import FAMILIES, build
from families.cases import write_rows
from families.checks import CHECKS, Outcome, Trial
from families.kit import Subject


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
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from vlmtune.cluster import connect

    connect()
    work = Path(options.work or tempfile.mkdtemp(prefix="families-"))
    print(f"{'family':20} " + " ".join(f"{name:9}" for name in CHECKS), flush=True)
    for name in options.names or FAMILIES:
        began = time.monotonic()
        trial = try_family(name, work)
        marks = " ".join(f"{outcome.mark:9}" for outcome in trial.outcomes.values())
        print(f"{name:20} {marks} {time.monotonic() - began:.0f} s", flush=True)
        for check, outcome in trial.outcomes.items():
            if outcome.detail and not options.quiet and check not in ("predict", "merge"):
                print(f"      {check}: {outcome.detail[:600]}", flush=True)


if __name__ == "__main__":
    main()
