"""The tasks of `search_quality.py`: their rows, the points at which adapters are trained, and the training.

A point is a set of values of the axes of a search. Its learning curve is trained by an engine of the packed
runner, on a GPU or on CPUs. Everything here writes numbers; `search_curves` reads them.
"""

import csv
import gzip
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "demo.yaml"
# 1,797 scans of handwritten digits, 8 x 8 pixels of 17 greys, as scikit-learn has them (load_digits), from
# the UCI repository (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits",
# CC BY 4.0). A row is 64 pixels and the digit.
DIGITS = HERE / "data" / "digits.csv.gz"
EVALUATIONS = 8  # of a run
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TARGETS = {"attention": ATTENTION, "all": ALL_LINEAR}

# The axes of the points. alpha is `scale` times the rank.
RATES = (1e-4, 3e-2)
RANKS = (4, 8, 16, 32)
SCALES = (0.5, 1, 2, 4, 8)
DROPOUTS = (0.0, 0.05, 0.1)
DESIGN = 48  # points of the design, spread evenly over the axes
SEEDS = (42, 43)  # each point's whole run is trained with both
SHORT = (0.25,)  # further runs of a point: so much of the steps, with a whole schedule of their own
LONG = (2.0, 4.0)  # further runs of the recipes

# The config's values; what people use without a search, as it stands; and the same for a model 32 times
# narrower than those that it is used on.
SHAPE = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
NAMED: dict[str, dict[str, Any]] = {
    "config": {"learning_rate": 4.5e-4, **SHAPE, "targets": "attention"},
    "recipe": {"learning_rate": 2e-4, **SHAPE, "targets": "all"},
    "recipe for the width": {"learning_rate": 6.4e-3, **SHAPE, "targets": "all"},
}


@dataclass(frozen=True)
class Task:
    """Rows to learn, by flags of train.py that differ from those of configs/demo.yaml."""

    rows: str
    flags: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "counting": Task("mall"),
    "digits": Task("digits/rows.jsonl", {"eval_fraction": 0.1, "test_fraction": 0.12}),
    "text": Task(
        "instructions.jsonl",
        {
            "eval_fraction": 0.3,
            "test_fraction": 0.1,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 10,
            "max_length": 256,
        },
    ),
    # A tenth of the rows that `counting` trains on, and five epochs: adapters over-fit.
    "few rows": Task("mall", {"eval_fraction": 0.06, "test_fraction": 0.86, "num_train_epochs": 5}),
}


def write_digits(folder: Path) -> None:
    """Write the scans as images of 64 x 64 pixels, with a question about each, to `folder`/rows.jsonl."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(DIGITS, "rt") as lines, (folder / "rows.jsonl").open("w") as rows:
        for number, (*pixels, digit) in enumerate(csv.reader(lines)):
            greys = np.array(pixels, float).reshape(8, 8) * (255 / 16)
            name = f"{number:04d}.png"
            Image.fromarray(greys.astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(
                folder / name
            )
            row = {"image": name, "instruction": "Which digit is this?", "output": str(int(float(digit)))}
            rows.write(json.dumps(row) + "\n")


def task_settings(name: str, demo: Path) -> Any:
    """The settings of a task, whose rows and base model are in the folder `demo`."""
    from vlmtune.config.parse import parse

    task = TASKS[name]
    flags = {
        "data_path": demo / task.rows,
        "model_name_or_path": demo / "llava",
        "output_dir": "unused",
        "eval_steps": 1 / EVALUATIONS,
        "torch_compile": "false",
        **task.flags,
    }
    return parse(["--config", str(CONFIG), *(f"--{flag}={value}" for flag, value in flags.items())])


def design() -> list[dict[str, Any]]:
    """The points of the design: even in each axis and between them.

    They are an additive recurrence whose steps are powers of a root of x^6 = x + 1 (M. Roberts' R sequence).
    """

    def one_of(values: tuple[Any, ...], share: float) -> Any:
        return values[int(share * len(values))]

    points = []
    low, high = np.log(RATES)
    steps = 1.1347241384015194 ** -np.arange(1.0, 6.0)
    for rate, rank, scale, dropout, targets in (0.5 + np.outer(np.arange(DESIGN), steps)) % 1:
        r = one_of(RANKS, rank)
        points.append(
            {
                "learning_rate": float(f"{math.exp(low + rate * (high - low)):.4g}"),
                "lora_r": r,
                "lora_alpha": int(r * one_of(SCALES, scale)),
                "lora_dropout": one_of(DROPOUTS, dropout),
                "targets": one_of(tuple(TARGETS), targets),
            }
        )
    return points


def runs() -> list[dict[str, Any]]:
    """Every run of a task: a point, its seed, and the share of the steps. Those of a point are together.

    Any number of the first points is spread over the axes, so that an interrupted file is of use.
    """
    made = []
    for name, point in [*NAMED.items(), *(("", point) for point in design())]:
        made += [{**point, "seed": seed, "share": 1.0} for seed in SEEDS]
        shares = (*SHORT, *LONG) if name.startswith("recipe") else SHORT
        made += [{**point, "seed": SEEDS[0], "share": share} for share in shares]
    return made


def flags_of(run: dict[str, Any], epochs: float) -> dict[str, Any]:
    """The flags of train.py for a run of a task whose whole runs take so many epochs."""
    values = {name: run[name] for name in ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "seed")}
    return {
        **values,
        "lora_target_modules": TARGETS[run["targets"]],
        "num_train_epochs": epochs * run["share"],
    }


def train_part(
    numbered: list[tuple[int, dict[str, Any]]],
    values: dict[str, Any],
    store: Any,
    file: Path,
    task: str,
    at_once: int,
) -> None:
    """Train some runs together in an engine of this process, and append their curves to `file`."""
    import torch

    from vlmtune.config.settings import Settings
    from vlmtune.packed.engine import Engine
    from vlmtune.packed.messages import TrialReport
    from vlmtune.packed.slot import Slot

    def write(trial_id: str, report: TrialReport) -> None:
        """Append the curve of a run that has ended. One that diverged has None as its last value."""
        if report.final:
            loss = report.metrics["eval_loss"]
            curve = [*curves[trial_id], *([] if math.isfinite(loss) else [None])]
            with file.open("a") as lines:
                lines.write(json.dumps({"task": task, **of[trial_id], "eval_loss": curve}) + "\n")

    class CurveEngine(Engine):
        """An engine that keeps evaluations and writes no checkpoints."""

        def _take_checkpoint(self, slot: Slot, report: TrialReport) -> None:
            curves[slot.trial_id].append(round(report.metrics["eval_loss"], 5))
            write(slot.trial_id, report)
            if report.final:
                self.leave(slot.trial_id)

    of = {str(number): run for number, run in numbered}
    curves: dict[str, list[float]] = {trial_id: [] for trial_id in of}
    shared = Settings.from_flags(values)
    largest = shared.replace(lora_target_modules=ALL_LINEAR, lora_r=max(RANKS), lora_dropout=max(DROPOUTS))
    engine = CurveEngine(
        shared,
        store,
        trials=at_once,
        max_lora_rank=max(RANKS),
        deliver=write,
        note=lambda _: None,
        most_demanding=largest,
    )
    if torch.cuda.is_available():
        torch.set_num_threads(1)
    waiting: Iterator[tuple[str, dict[str, Any]]] = iter(of.items())
    while True:
        while len(engine.slots) < at_once and (following := next(waiting, None)) is not None:
            trial_id, run = following
            settings = shared.replace(**flags_of(run, shared.training.num_train_epochs))
            engine.join(engine.slot_factory.make(trial_id, settings, folder=""))
        if not engine.train_round():
            engine.close()
            return


def prepared(tasks: list[str], demo: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """The settings by flag name and the prepared rows of each task."""
    import ray

    from vlmtune.cluster import connect
    from vlmtune.data.cache import prepare_store
    from vlmtune.data.source import DataSource

    if "digits" in tasks and not (demo / "digits" / "rows.jsonl").exists():
        write_digits(demo / "digits")
    connect()
    made = {}
    for name in tasks:
        settings = task_settings(name, demo)
        made[name] = (
            settings.to_flags(),
            prepare_store(DataSource.from_settings(settings), f"{demo}/prepared"),
        )
    ray.shutdown()
    return made


def learn(
    file: Path, demo: Path, tasks: list[str], processes: int, at_once: int, limit: int | None = None
) -> None:
    """Append the curves of all runs that `file` does not have, those of each task in `processes` parts.

    Args:
        at_once: runs that train together in an engine.
        limit: train only so many runs of each task, to try it.
    """
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {json.dumps({**row, "eval_loss": None}, sort_keys=True) for row in known}
    started, jobs = time.monotonic(), []
    for task, (values, store) in prepared(tasks, demo).items():
        todo = [
            (number, run)
            for number, run in enumerate(runs()[:limit])
            if json.dumps({"task": task, **run, "eval_loss": None}, sort_keys=True) not in done
        ]
        parts = [todo[first::processes] for first in range(processes)]
        jobs += [(part, values, store, file, task, at_once) for part in parts if part]
    print(f"{sum(len(job[0]) for job in jobs)} runs in {len(jobs)} engines", flush=True)
    with ProcessPoolExecutor(max(len(jobs), 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(train_part, *job) for job in jobs]:
            future.result()
    print(f"{time.monotonic() - started:.0f} s of training, start of the engines included", flush=True)
