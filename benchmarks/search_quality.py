"""Does the search find better adapters than random search, for as many trials and for the same training?

    python -m vlmtune.demo
    python benchmarks/search_quality.py curves CURVES.jsonl [--demo demo] [--processes 2]
    python benchmarks/search_quality.py compare CURVES.jsonl [--trials 40] [--seeds 30] [--figure FILE.svg]
    python benchmarks/search_quality.py startup CURVES.jsonl [--seeds 20]
    python benchmarks/search_quality.py rungs CURVES.jsonl [--seeds 14]

`curves` trains adapters for the demo's task at every point of a grid (`POINTS`) to their end, in engines of
the packed runner, and appends the eval_loss of every evaluation of a run to the file. It resumes when you
rerun the same command.

The other modes run whole searches over these curves. Optuna's samplers and ASHA are those of vlmtune, called
as Tune calls them. Only training is looked up, by interpolation between two learning rates. `compare` sets
the default against random search, `startup` and `rungs` with other options of its own. All trials that run at
once advance by one evaluation at a time, as in an engine, and a free slot is filled before the next
evaluation. The unit of compute is one evaluation interval, an eighth of a run.

The result of a search is the eval_loss of its best complete trial, as a multiple of the best in the space.
Methods are compared in pairs by seed, with 95 % bootstrap intervals of the mean ratio.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from figure import write_figure

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
EVALUATIONS = 8  # of a run
AT_ONCE = 4  # trials in an engine
SHAPES = ((4, 8), (8, 16), (16, 32), (32, 64))  # lora_r and lora_alpha
RATES = tuple(round(float(rate), 7) for rate in np.geomspace(3.2e-5, 2e-2, 15))
# The values of the two shipped configs, with their learning rates times 32 for a model 32 times narrower.
BASELINES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b.yaml": {"lora_r": 16, "lora_alpha": 32, "learning_rate": 4.5e-4},
    "llama-3.2-11b-vision.yaml": {
        "lora_r": 8,
        "lora_alpha": 32,
        "learning_rate": 6.4e-4,
        "lora_dropout": 0.05,
    },
}
# Every second rate comes first, so that an interrupted run has a usable part.
POINTS: list[dict[str, Any]] = [
    *BASELINES.values(),
    *(
        {"lora_r": r, "lora_alpha": alpha, "learning_rate": rate}
        for rate in RATES[::2] + RATES[1::2]
        for r, alpha in SHAPES
    ),
]
# Search spaces: that of configs/demo.yaml, and that of llava-1.5-7b.yaml.
SPACES: dict[str, dict[str, Any]] = {
    "demo": {},
    "llava": {
        "search_space": {
            "lora_r": {"choice": [4, 8, 16, 32]},
            "lora_alpha": {"expr": "2 * lora_r"},
            "learning_rate": {"loguniform": [3.2e-5, 1.6e-2]},
        },
    },
}

Sampler = Callable[[int], optuna.samplers.BaseSampler]


# The learning curves


def demo_settings(demo: Path, **flags: Any) -> Any:
    from vlmtune.config.parse import parse

    paths = {
        "data_path": demo / "mall",
        "model_name_or_path": demo / "llava",
        "output_dir": "unused",
        "eval_steps": 1 / EVALUATIONS,
    }
    return parse(
        ["--config", str(CONFIG), *(f"--{name}={value}" for name, value in {**paths, **flags}.items())]
    )


def train_part(points: list[dict[str, float]], values: dict[str, Any], store: Any, file: Path) -> None:
    """Train some points together in an engine of this process, and append their curves to `file`."""
    from vlmtune.config.settings import Settings
    from vlmtune.packed.engine import Engine
    from vlmtune.packed.messages import TrialReport
    from vlmtune.packed.slot import Slot

    class CurveEngine(Engine):
        """An engine that keeps evaluations and writes no checkpoints."""

        def _take_checkpoint(self, slot: Slot, report: TrialReport) -> None:
            curve = curves[int(slot.trial_id)]
            curve.append(round(report.metrics["eval_loss"], 6))
            if report.last:
                with file.open("a") as lines:
                    lines.write(json.dumps({**points[int(slot.trial_id)], "eval_loss": curve}) + "\n")
                self.leave(slot.trial_id)

    curves: list[list[float]] = [[] for _ in points]
    rank = max(r for r, _ in SHAPES)
    shared = Settings.from_flags(values)
    engine = CurveEngine(shared, store, trials=AT_ONCE, rank=rank, deliver=lambda *_: None, note=print)
    waiting = iter(enumerate(points))
    while True:
        while len(engine.slots) < AT_ONCE and (following := next(waiting, None)) is not None:
            number, point = following
            engine.join(engine.slot_factory.make(str(number), shared.replace(**point), folder=""))
        if not engine.train_round():
            return


def train_curves(file: Path, demo: Path, processes: int) -> None:
    """Append the curves of all points that `file` does not have."""
    import ray

    from vlmtune.cluster import connect
    from vlmtune.data.cache import prepare_store
    from vlmtune.data.source import DataSource

    settings = demo_settings(demo)
    known = [dict(row, eval_loss=None) for row in read_lines(file)] if file.exists() else []
    points = [point for point in POINTS if dict(point, eval_loss=None) not in known]
    with tempfile.TemporaryDirectory() as cache:
        connect()
        store = prepare_store(DataSource.from_settings(settings), f"{cache}/rows")
        ray.shutdown()
        parts = [points[first::processes] for first in range(processes)]
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(
                pool.map(
                    train_part,
                    parts,
                    [settings.to_flags()] * processes,
                    [store] * processes,
                    [file] * processes,
                )
            )


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Curves:
    """Learning curves by rank and alpha: log losses, interpolated linearly in the log learning rate."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.baselines = {
            name: next(
                row["eval_loss"] for row in rows if dict(row, eval_loss=None) == dict(values, eval_loss=None)
            )
            for name, values in BASELINES.items()
        }
        self.rates: dict[tuple[int, int], list[float]] = {}
        self.losses: dict[tuple[int, int], np.ndarray] = {}
        for shape in SHAPES:
            of_shape = [
                row
                for row in rows
                if (row["lora_r"], row["lora_alpha"]) == shape and "lora_dropout" not in row
            ]
            of_shape.sort(key=lambda row: row["learning_rate"])
            self.rates[shape] = [row["learning_rate"] for row in of_shape]
            self.losses[shape] = np.log([row["eval_loss"] for row in of_shape])

    def at(self, values: dict[str, Any]) -> np.ndarray:
        """eval_loss at each of the evaluations."""
        shape = values["lora_r"], values["lora_alpha"]
        rates, rate = np.log(self.rates[shape]), math.log(values["learning_rate"])
        assert rates[0] - 1e-6 <= rate <= rates[-1] + 1e-6, f"{values} lies outside of the curves"
        return np.exp([np.interp(rate, rates, losses) for losses in self.losses[shape].T])


# Searches over them


@dataclass(frozen=True)
class Method:
    """A search's sampler, and the options of its early stopping."""

    sampler: Sampler
    stopping: dict[str, Any] = field(default_factory=dict)


def default_sampler(seed: int) -> optuna.samplers.BaseSampler:
    from vlmtune.search.sampler import make_tpe

    return make_tpe(seed)


NEVER = {"early_stopping": "none"}
METHODS = {
    "TPE and ASHA (vlmtune)": Method(default_sampler),
    "random and ASHA": Method(optuna.samplers.RandomSampler),
    "TPE alone": Method(default_sampler, NEVER),
    "random search": Method(optuna.samplers.RandomSampler, NEVER),
}


def search(
    space: Any, curves: Curves, method: Method, *, at_once: int, seed: int, trials: int, compute: float
) -> list[tuple[int, int, float]]:
    """Run one search until it has ended `trials` trials or spent `compute`, running trials included.

    Returns:
        (compute spent, trials ended, best eval_loss of the complete trials) after each trial that ended.
    """
    from vlmtune.search.sampler import TrialSampler
    from vlmtune.search.tuner import make_scheduler
    from vlmtune.training.meter import EVALUATION

    with patch("vlmtune.search.sampler.make_tpe", method.sampler):
        searcher = TrialSampler(space, metric="eval_loss", mode="min", seed=seed)
    scheduler = make_scheduler(space.settings.replace(**method.stopping), space)
    scheduler.set_search_properties("eval_loss", "min")
    controller: Any = None  # ASHA does not use it
    running: dict[str, tuple[Any, Iterator[tuple[int, float]]]] = {}
    spent, started, ended, best = 0, 0, 0, math.inf
    progress: list[tuple[int, int, float]] = []
    while spent < compute:
        while len(running) < at_once and started < trials:
            name = f"t{started}"
            started += 1
            trial: Any = SimpleNamespace(trial_id=name, config=searcher.suggest(name), status="RUNNING")
            scheduler.on_trial_add(controller, trial)
            running[name] = trial, iter(enumerate(curves.at(trial.config).tolist(), 1))
        if not running:
            break
        for name, (trial, curve) in list(running.items()):
            number, loss = next(curve)
            spent += 1
            result = {"eval_loss": loss, EVALUATION: number, "step": number, "max_steps": EVALUATIONS}
            last = number == EVALUATIONS
            if last:
                scheduler.on_trial_complete(controller, trial, result)
            if last or scheduler.on_trial_result(controller, trial, result) == "STOP":
                searcher.on_trial_complete(name, result)
                del running[name]
                ended += 1
                best = min(best, loss) if last else best
                progress.append((spent, ended, best))
            else:
                searcher.on_trial_result(name, result)
            if spent >= compute:
                break
    return progress


def space_of(name: str, demo: Path) -> Any:
    from vlmtune.search.space import Space

    settings = demo_settings(demo).replace(**SPACES[name])
    return Space.parse(settings.search.search_space, settings)


def least(space: Any, curves: Curves) -> float:
    """The best eval_loss in the space."""
    low, high = space.distributions["learning_rate"].ends
    losses = []
    for rank in space.distributions["lora_r"].ends:
        known = curves.rates[rank, 2 * rank]
        # Between these rates, curves are straight lines.
        rates = [low, high, *(rate for rate in known if low < rate < high)]
        losses += [
            curves.at({"lora_r": rank, "lora_alpha": 2 * rank, "learning_rate": rate})[-1] for rate in rates
        ]
    return float(min(losses))


def final(progress: list[tuple[int, int, float]]) -> float:
    return min((best for _, _, best in progress), default=math.inf)


def interval(ratios: list[float]) -> str:
    """The geometric mean of ratios and its 95 % bootstrap interval, in percent over or under 1."""
    logs = np.log(ratios)
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, high = np.exp(np.percentile(draws, [2.5, 97.5])) - 1
    return f"{math.exp(logs.mean()) - 1:+.1%} ({low:+.1%} to {high:+.1%})"


def regrets(
    space: Any,
    curves: Curves,
    method: Method,
    args: argparse.Namespace,
    *,
    at_once: int,
    trials: int,
    compute: float,
) -> list[float]:
    floor = least(space, curves)
    runs = [
        search(space, curves, method, at_once=at_once, seed=seed, trials=trials, compute=compute)
        for seed in range(args.seeds)
    ]
    return [final(run) / floor for run in runs]


def compare(args: argparse.Namespace, curves: Curves) -> None:
    """Print a table for each space and number of trials at once: multiples of the space's best loss, and the
    default compared with other methods."""
    full = args.trials * EVALUATIONS
    budgets = {
        f"{args.trials} trials": (args.trials, math.inf),
        f"the compute of {args.trials} whole runs": (10**6, float(full)),
    }
    for name in args.spaces:
        space = space_of(name, args.demo)
        floor = least(space, curves)
        fixed = " and ".join(
            f"{curve[-1] / floor:.1f} times it with the values of {config}"
            for config, curve in curves.baselines.items()
        )
        print(f"\n{name}: the best eval_loss is {floor:.4f}; without a search {fixed}")
        for at_once, (budget, (trials, compute)) in product(args.at_once, budgets.items()):
            print(f"  {at_once} at once, {budget}")
            results = {
                label: regrets(space, curves, method, args, at_once=at_once, trials=trials, compute=compute)
                for label, method in METHODS.items()
            }
            ours = next(iter(results.values()))
            for label, values in results.items():
                quartiles = " ".join(f"{value:.3f}" for value in np.percentile(values, [25, 50, 75]))
                against = (
                    ""
                    if values is ours
                    else interval([mine / theirs for mine, theirs in zip(ours, values, strict=True)])
                )
                print(f"    {label:24} {quartiles}  {against}", flush=True)


def startup() -> dict[str, Method]:
    """TPE with other options, with the search's early stopping."""

    def tpe(**options: Any) -> Method:
        return Method(lambda seed: optuna.samplers.TPESampler(seed=seed, **options))

    variants = {}
    for size, liar, multivariate in product((4, 8, 10, 16), (True, False), (True, False)):
        kind = "multivariate" if multivariate else "independent"
        label = f"startup {size}, {'liar' if liar else 'no liar'}, {kind}"
        variants[label] = tpe(n_startup_trials=size, constant_liar=liar, multivariate=multivariate)
    return {**variants, "random": METHODS["random and ASHA"]}


def rungs() -> dict[str, Method]:
    """ASHA with other first rungs and other reduction factors."""
    pairs = [(1, 2), (1, 3), (1, 8), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)]
    variants = {
        f"first at {part}/{EVALUATIONS}, one in {factor}": Method(
            default_sampler, {"grace_period": part / EVALUATIONS, "reduction_factor": factor}
        )
        for part, factor in pairs
    }
    return {**variants, "never": METHODS["TPE alone"], "random search": METHODS["random search"]}


def rank(variants: dict[str, Method], args: argparse.Namespace, curves: Curves) -> None:
    """Print the geometric mean multiple of the best loss over all spaces, for each variant.

    The budgets are `--trials` trials, and the compute of as many whole runs.
    """
    budgets = [(args.trials, math.inf), (10**6, float(args.trials * EVALUATIONS))]
    columns = [(at_once, *budget) for budget in budgets for at_once in args.at_once]
    print(
        f"{'trials at once, ' + str(args.trials) + ' trials | their compute':44}"
        + "".join(f"{at_once:7}" for at_once, *_ in columns)
    )
    for label, method in variants.items():
        means = [
            statistics.geometric_mean(
                value
                for name in args.spaces
                for value in regrets(
                    space_of(name, args.demo),
                    curves,
                    method,
                    args,
                    at_once=at_once,
                    trials=trials,
                    compute=compute,
                )
            )
            for at_once, trials, compute in columns
        ]
        print(f"{label:44}" + "".join(f"{mean:7.3f}" for mean in means), flush=True)


# The figure


def figure(args: argparse.Namespace, curves: Curves) -> None:
    """Draw each method's median multiple of the best loss by compute spent, as an SVG file."""
    from vlmtune.search.report.plot import Plot, Scale

    space, at_once = space_of(args.spaces[0], args.demo), args.at_once[len(args.at_once) // 2]
    floor, full = least(space, curves), args.trials * EVALUATIONS
    grid = list(range(EVALUATIONS, full + 1, EVALUATIONS // 2))
    lines: dict[str, list[tuple[float, float]]] = {}
    for label, method in METHODS.items():
        runs = [
            search(space, curves, method, at_once=at_once, seed=seed, trials=10**6, compute=full)
            for seed in range(args.seeds)
        ]
        medians = [
            statistics.median(final([one for one in run if one[0] <= spent]) / floor for run in runs)
            for spent in grid
        ]
        points = [
            (spent / EVALUATIONS, value)
            for spent, value in zip(grid, medians, strict=True)
            if math.isfinite(value)
        ]
        lines[label] = [
            point for one, other in pairwise(points) for point in (one, (other[0], one[1]))
        ] + points[-1:]
    values = [value for line in lines.values() for _, value in line]
    plot = Plot(
        Scale.of([0, args.trials]),
        Scale.of(values),
        "compute, in whole runs",
        "best so far, multiple of the least eval_loss",
    )
    write_figure(
        args.figure, plot, lines, f"best eval_loss so far, multiple of the least ({at_once} trials at once)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("curves", "compare", "startup", "rungs"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--processes", type=int, default=2, help="of curves: engines side by side")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--at_once", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--figure", help="of compare: draw the first space's searches into this SVG file")
    args = parser.parse_args()
    if args.mode == "curves":
        train_curves(args.file, args.demo, args.processes)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves = Curves(read_lines(args.file))
    if args.mode != "compare":
        rank({"startup": startup, "rungs": rungs}[args.mode](), args, curves)
        return
    compare(args, curves)
    if args.figure:
        figure(args, curves)


if __name__ == "__main__":
    main()
