"""Learning curves at any point of a space, from those that `search_quality.py learn` trained.

A Gaussian process with a Matern kernel (5/2), one length for each axis, fits the log losses of each task. Its
lengths maximise the likelihood of the final losses. The noise of training is that of the pairs of seeds.
"""

import csv
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from search_tasks import EVALUATIONS, LONG, NAMED, RATES, SEEDS, SHORT, TASKS

CURVES = Path(__file__).parent / "data" / "curves.json.gz"
WORST = 1.0  # log losses are cut at so much above the worst start of a run: beyond it, all is equally useless
AXES = ("learning_rate", "lora_r", "scale", "lora_dropout", "targets")


def pack(lines: Path, target: Path = CURVES) -> int:
    """Write the runs of a file of `learn` compactly, and return their number."""
    runs = sorted(
        (json.loads(line) for line in lines.read_text().splitlines()),
        key=lambda run: json.dumps(run, sort_keys=True),
    )
    target.write_bytes(gzip.compress(json.dumps(runs, separators=(",", ":")).encode(), mtime=0))
    return len(runs)


def unpack(source: Path = CURVES) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(gzip.decompress(source.read_bytes()))
    return runs


def coordinates(values: Mapping[str, Any]) -> np.ndarray:
    """A point on the axes, each scaled to about 1."""
    low, high = np.log(RATES)
    return np.array(
        [
            (math.log(values["learning_rate"]) - low) / (high - low),
            math.log2(values["lora_r"]) / 5,
            math.log2(values["lora_alpha"] / values["lora_r"]) / 4,
            values["lora_dropout"] / 0.1,
            float(values["targets"] == "all"),
        ]
    )


def kernel(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Matern 5/2 between points `[N, D]` and `[M, D]`."""
    apart = np.sqrt(5) * np.sqrt((((one[:, None] - other[None]) / lengths) ** 2).sum(-1))
    return np.asarray((1 + apart + apart**2 / 3) * np.exp(-apart))


@dataclass(frozen=True)
class CurveTask:
    """What training gives on one task.

    Attributes:
        points: `[N, 5]`, those that were trained.
        lengths: of the kernel.
        mean: `[K]`, of the outputs.
        weights: `[N, K]`: the kernel's inverse times the outputs, which are the log losses at the
            evaluations of a whole run, then the last ones of the short runs.
        noise: `[N, EVALUATIONS]`, half the difference between the two seeds of a point, in log losses.
        error: root mean square error of the final log loss of a point that is left out, and that of the mean.
        named: the final losses of NAMED, by name and share of the steps.
    """

    points: np.ndarray
    lengths: np.ndarray
    mean: np.ndarray
    weights: np.ndarray
    noise: np.ndarray
    error: tuple[float, float]
    named: dict[tuple[str, float], float]

    def curve(self, values: Mapping[str, Any], noise: int | None = None) -> np.ndarray:
        """Losses at the evaluations of a whole run.

        Args:
            noise: a number that chooses the noise among that of the eight nearest points; None: without.
        """
        return self._outputs(values, noise)[:EVALUATIONS]

    def short(self, values: Mapping[str, Any], share: float, noise: int | None = None) -> float:
        """The last loss of a run of a share of the steps, with a whole schedule of its own."""
        return float(self._outputs(values, noise)[EVALUATIONS + SHORT.index(share)])

    def _outputs(self, values: Mapping[str, Any], noise: int | None) -> np.ndarray:
        at = coordinates(values)[None]
        logs = (kernel(at, self.points, self.lengths) @ self.weights)[0] + self.mean
        if noise is not None:
            near = np.argsort((((at - self.points) / self.lengths) ** 2).sum(-1))[:8]
            drawn = self.noise[near[noise % 8]] * (1 if noise // 8 % 2 else -1)
            logs = logs + np.concatenate([drawn, np.repeat(drawn[-1], len(SHORT))])
        return np.asarray(np.exp(logs))


def fit(runs: Sequence[Mapping[str, Any]]) -> CurveTask:
    """Fit the runs of one task."""
    by_point: dict[str, dict[tuple[int, float], list[float]]] = {}
    for run in runs:
        point = {
            name: run[name] for name in ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "targets")
        }
        known = by_point.setdefault(json.dumps(point), {})
        known[run["seed"], run["share"]] = _whole_curve(run["eval_loss"])
    ceiling = WORST + max(
        math.log(curve[0]) for seeds in by_point.values() for curve in seeds.values() if curve
    )
    complete = {
        point: seeds
        for point, seeds in by_point.items()
        if {(seed, 1.0) for seed in SEEDS} | {(SEEDS[0], share) for share in SHORT} <= seeds.keys()
    }

    def logs(curve: list[float]) -> np.ndarray:
        return np.minimum(np.log(curve), ceiling)

    outputs, noise = [], []
    for seeds in complete.values():
        first, second = (logs(seeds[seed, 1.0]) for seed in SEEDS)
        shorter = [min(logs(seeds[SEEDS[0], share])) for share in SHORT]
        outputs.append([*(first + second) / 2, *shorter])
        noise.append((first - second) / 2)
    points = np.array([coordinates(json.loads(point)) for point in complete])
    values = np.array(outputs)
    named = {
        (name, share): math.exp(
            min(float(np.min(logs(by_point[json.dumps(point)][SEEDS[0], share]))), ceiling)
        )
        for name, point in NAMED.items()
        for share in (1.0, *LONG)
        if (SEEDS[0], share) in by_point.get(json.dumps(point), {})
    }
    mean, centred = values.mean(0), values - values.mean(0)
    lengths, nugget = _lengths(points, np.minimum.accumulate(centred[:, :EVALUATIONS], 1)[:, -1])
    inverse = np.linalg.inv(kernel(points, points, lengths) + nugget * np.eye(len(points)))
    weights = inverse @ centred
    left_out = weights[:, EVALUATIONS - 1] / np.diag(inverse)
    error = float(np.sqrt((left_out**2).mean())), float(centred[:, EVALUATIONS - 1].std())
    return CurveTask(points, lengths, mean, weights, np.array(noise), error, named)


def _whole_curve(losses: Sequence[float | None]) -> list[float]:
    """A curve of all evaluations. One that diverged stays at its worst from there on."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return [math.exp(5.0)] * EVALUATIONS
    return [*finite, *[math.exp(5.0)] * (EVALUATIONS - len(finite))]


def _lengths(points: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Lengths of the kernel and noise variance that make the values most likely, at unit signal variance."""
    scaled = values / values.std()

    def cost(logs: np.ndarray) -> float:
        matrix = kernel(points, points, np.exp(logs[:-2])) * np.exp(logs[-2])
        matrix += (np.exp(logs[-1]) + 1e-6) * np.eye(len(points))
        sign, size = np.linalg.slogdet(matrix)
        prior = 0.05 * float(((logs[:-2] - 0.5) ** 2).sum())
        return float(scaled @ np.linalg.solve(matrix, scaled) + size) + prior if sign > 0 else 1e12

    start = np.array([math.log(0.3), 0.5, 0.5, 1.0, 0.5, 0.5, math.log(0.05)])
    found = minimize(cost, start, method="L-BFGS-B", bounds=[(-2.5, 3.5)] * 5 + [(-3, 4), (-9, 0)]).x
    return np.exp(found[:-2]), float(np.exp(found[-1] - found[-2])) + 1e-6


def load_tasks(source: Path = CURVES) -> dict[str, CurveTask]:
    """The tasks of the stored curves by name, those of which anything is stored."""
    runs = unpack(source) if source.exists() else []
    by_name = {name: [run for run in runs if run["task"] == name] for name in TASKS}
    return {name: fit(own) for name, own in by_name.items() if own}


@dataclass(frozen=True)
class TableTask:
    """One model of a public table of final losses by learning rate and rank; linear between its points."""

    rates: np.ndarray
    ranks: np.ndarray
    losses: np.ndarray

    def curve(self, values: Mapping[str, Any], noise: int | None = None) -> np.ndarray:
        """The final loss, at every evaluation."""
        rate = np.clip(math.log(values["learning_rate"]), self.rates[0], self.rates[-1])
        rank = np.clip(math.log2(values["lora_r"]), self.ranks[0], self.ranks[-1])
        by_rank = [np.interp(rate, self.rates, row) for row in self.losses]
        return np.full(EVALUATIONS, float(np.interp(rank, self.ranks, by_rank)))


def load_table(file: Path) -> dict[str, TableTask]:
    """The models of the public table that have every combination of some rates and ranks."""
    with file.open() as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    tasks = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {
            (float(row["learning_rate"]), int(row["lora_r"])): float(row["test_nll"])
            for row in rows
            if row["model"] == model
        }
        ranks = sorted({rank for _, rank in own})
        rates = sorted(
            rate for rate in {rate for rate, _ in own} if all((rate, rank) in own for rank in ranks)
        )
        if len(rates) < 3:
            continue
        losses = np.array([[own[rate, rank] for rate in rates] for rank in ranks])
        tasks[model] = TableTask(np.log(rates), np.log2(ranks), losses)
    return tasks
