"""Does a search find better adapters than other searches, and than no search, for the same training?

    python -m vlmtune.demo
    python benchmarks/search_quality.py learn CURVES.jsonl [--demo demo] [--processes 2] [--at_once 8]
    python benchmarks/search_quality.py pack CURVES.jsonl
    python benchmarks/search_quality.py compare CELLS.jsonl [--budgets 16] [--at_once 16] [--seeds 20] [--all]
    python benchmarks/search_quality.py table CELLS.jsonl

`learn` trains adapters of four tasks at some 50 points to their end, in engines of the packed runner, and
appends the eval_loss of every evaluation of a run to the file. It resumes when you rerun the same command.
`pack` writes these numbers to benchmarks/data/curves.json.gz, from which whole searches are replayed.

`compare` replays searches, `table` prints them. A fifth task is a public table of final losses. The result of
a search is the loss, without the noise of training, of the trial that looked best, as a share above the least
loss of the space: its regret. Ways to search are compared in pairs by seed, with 95 % bootstrap intervals.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from search_tasks import TASKS, learn

RESAMPLES = 4000


def interval(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The ratio of mean regrets `[problems, seeds]`, its geometric mean over problems, with its interval.

    "below" where a mean is below the least loss of the space, as that of another alpha may be: no ratio then.
    """
    if min(ours.mean(1).min(), theirs.mean(1).min()) < 0:
        return "below"

    def ratio(drawn: np.ndarray) -> np.ndarray:
        means = [np.maximum(one[:, drawn].mean(-1), 0.0) + 1e-4 for one in (ours, theirs)]
        return np.asarray(np.exp(np.log(means[0] / means[1]).mean(0)))

    seeds = ours.shape[1]
    draws = np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))
    low, high = np.percentile(ratio(draws), [2.5, 97.5])
    value = float(ratio(np.arange(seeds)[None])[0])
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def print_table(file: Path, against: str) -> None:
    """Print, for each budget and number of trials at once, the mean regret of each way to search."""
    cells: dict[tuple[Any, ...], dict[str, dict[str, dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for line in file.read_text().splitlines():
        one = json.loads(line)
        budget = (
            f"{one['trials']} trials" if one["compute"] is None else f"compute of {one['compute'] / 8:g} runs"
        )
        cells[budget, one["at_once"]][one["contender"]][one["problem"]] = one
    for (budget, at_once), contenders in cells.items():
        names = list(next(iter(contenders.values())))
        ranks = mean_ranks(contenders)
        print(f"\n### {budget}, {at_once} at once\n")
        print("| way to search | " + " | ".join([*names, "ratio", "mean rank", "by the model"]) + " |")
        print("|---" * (len(names) + 4) + "|")
        for label, found in contenders.items():
            shown = [f"{np.mean(found[name]['regrets']):.1%}" if name in found else "" for name in names]
            both = [name for name in names if name in found and name in contenders.get(against, {})]
            ratio = ""
            if both and label != against:
                ours, theirs = (
                    np.array([contenders[one][name]["regrets"] for name in both]) for one in (label, against)
                )
                ratio = interval(ours, theirs)
            by_tpe = np.mean([one["by_model"] for one in found.values()])
            rank = f"{ranks[label]:.1f}" if label in ranks else ""
            print(f"| {label} | " + " | ".join([*shown, ratio, rank, f"{by_tpe:.1f}"]) + " |")


def mean_ranks(contenders: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """The rank of each way to search by its mean regret, 1 for the least, as a mean over the tasks."""
    problems = set().union(*contenders.values())
    labels = [label for label, found in contenders.items() if found.keys() == problems]
    means = [
        [float(np.mean(contenders[label][name]["regrets"])) for name in sorted(problems)] for label in labels
    ]
    return dict(zip(labels, rankdata(means, axis=0).mean(1).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("learn", "pack", "compare", "table"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the sample files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--processes", type=int, default=2, help="side by side; of learn: engines of each task"
    )
    parser.add_argument(
        "--at_once", type=int, nargs="+", default=[16], help="runs or trials that train at once"
    )
    parser.add_argument("--limit", type=int, help="of learn: train only so many runs of each task")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16], help="of compare: trials of a search")
    parser.add_argument("--seeds", type=int, default=20, help="of compare")
    parser.add_argument("--compute", action="store_true", help="of compare: also at equal compute")
    parser.add_argument("--all", action="store_true", help="of compare: every way to search, not four")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="of compare: these ways to search")
    args = parser.parse_args()
    if args.mode == "learn":
        learn(args.file, args.demo, args.tasks, args.processes, args.at_once[0], args.limit)
        return
    from search_contenders import BEFORE, CONTENDERS, cells, compare, fit_quality, problems, without_search
    from search_curves import pack

    if args.mode == "pack":
        print(f"{pack(args.file)} runs")
    elif args.mode == "table":
        print("\n".join([*fit_quality(), "", *without_search()]))
        print_table(args.file, BEFORE)
    else:
        compare(
            args.file,
            labels=args.only or list(CONTENDERS)[: None if args.all else 4],
            names=list(problems()),
            where=cells(args.budgets, args.at_once, equal_compute=args.compute),
            seeds=args.seeds,
            processes=args.processes,
        )


if __name__ == "__main__":
    main()
