"""What `search_quality.py compare` compares: ways to search, on tasks with a search space each."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from search_curves import CURVES, CurveTask, load_table, load_tasks
from search_replay import AS_MANY_AS_FIT, NEVER, Contender, Problem, Search, short_first
from search_tasks import ALL_LINEAR, ATTENTION, EVALUATIONS

from vlmtune.config.settings import Settings
from vlmtune.search.first_points import usual_rate

TABLE = Path(__file__).parent / "data" / "lora_sft_sweep.csv"
DEMO_WIDTH, TABLE_WIDTH = 128, 4096
SPACES: dict[str, dict[str, Any]] = {
    # As in configs/demo.yaml and configs/llava-1.5-7b.yaml: alpha follows from the rank.
    "tied": {
        "learning_rate": {"loguniform": [1e-4, 2e-2]},
        "lora_r": {"choice": [4, 8, 16, 32]},
        "lora_alpha": {"expr": "2 * lora_r"},
    },
    # Everything that the curves vary.
    "wide": {
        "learning_rate": {"loguniform": [1e-4, 2e-2]},
        "lora_r": {"choice": [8, 16, 32]},
        "lora_alpha": {"choice": [16, 32, 64]},
        "lora_dropout": {"quniform": [0.0, 0.1, 0.05]},
        "lora_target_modules": {"choice": [ATTENTION, ALL_LINEAR]},
    },
}
RECIPE = {"learning_rate": 6.4e-3, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ALL_LINEAR}


def tpe(startup: int) -> Any:
    return lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
    )


def gp(startup: int) -> Any:
    return lambda seed: optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=startup, warn_independent_sampling=False
    )


def sobol(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.QMCSampler(
        qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False
    )


BEFORE = "TPE after 10 trials (the default before)"
OURS = "guided, then TPE after 10 (the default)"
CONTENDERS: dict[str, Contender] = {
    BEFORE: Contender(tpe(10), needs=10),
    OURS: Contender(guided=True),
    "random": Contender(optuna.samplers.RandomSampler, needs=math.inf),
    "random, nothing is stopped": Contender(optuna.samplers.RandomSampler, needs=math.inf, stopping=NEVER),
    "Sobol": Contender(sobol, needs=math.inf),
    "TPE after 4 trials": Contender(tpe(4), needs=4),
    "GP after 4 trials": Contender(gp(4), needs=4),
    "the default, misled by --warm_start": Contender(guided=True, misled=True),
    "portfolio of 4, then TPE": Contender(portfolio=4, needs=6),
    "portfolio of 8, then TPE": Contender(portfolio=8, needs=6),
    "portfolio of 8, then GP": Contender(gp(1), portfolio=8),
    "portfolio all along": Contender(portfolio=63),
    "guided all along": Contender(guided=True, startup=AS_MANY_AS_FIT),
    "guided, then TPE after 4": Contender(guided=True, startup=4),
    "guided, then TPE after 6": Contender(guided=True, startup=6),
    "guided, then GP after 6": Contender(gp(1), guided=True, startup=6),
    "guided, then TPE, nothing is stopped": Contender(guided=True, stopping=NEVER),
    "guided, then TPE, rungs at 1/4 and 1/2": Contender(
        guided=True, stopping={"grace_period": 0.25, "reduction_factor": 2}
    ),
    "guided, then TPE, Hyperband of 3 brackets": Contender(guided=True, brackets=3),
    "guided, then TPE, alpha of 32 at every rank": Contender(guided=True, alpha={"lora_alpha": 32}),
    "guided, then TPE, rsLoRA with alpha of 8": Contender(
        guided=True, alpha={"lora_alpha": 8, "use_rslora": True}
    ),
    "guided, short runs of 1/4 first": Contender(guided=True, share=0.25),
}


@cache
def problems() -> dict[str, list[Problem]]:
    """The problems by name. One of several models is taken by the seed."""
    base = {
        "model_name_or_path": "demo",
        "learning_rate": 4.5e-4,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ATTENTION,
    }
    made: dict[str, list[Problem]] = {}
    for name, task in load_tasks(CURVES).items():
        for space, entries in SPACES.items():
            recipe = RECIPE if space == "wide" else None  # else it is a run beside the search
            settings = Settings.from_flags({**base, "search_space": entries, "recipe": recipe})
            made[f"{name}, {space}"] = [Problem(task, settings, DEMO_WIDTH)]
    table = {
        "learning_rate": {"loguniform": [4e-5, 1e-3]},
        "lora_r": {"choice": [1, 4, 16, 64]},
    }
    recipe = {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32}
    flags = {**base, "learning_rate": 4e-5, "search_space": table, "recipe": recipe}
    settings = Settings.from_flags(flags)
    made["public table"] = [
        Problem(task, settings, TABLE_WIDTH, stops=False) for task in load_table(TABLE).values()
    ]
    return made


@cache
def least(name: str, number: int) -> float:
    return problems()[name][number].least()


@cache
def portfolio(name: str, number: int, count: int) -> list[dict[str, Any]]:
    """Points of a problem's space as Optuna's parameters, chosen one by one by their results on other tasks.

    Each lowers most the sum over the other tasks of the log of the least loss so far. A learning rate is
    taken over by its ratio to the usual one of the width of the model.
    """
    problem = problems()[name][number]
    task, _, space = name.partition(", ")
    others = [
        made[0]
        for other, made in problems().items()
        if not other.startswith((task, "public")) and other.endswith(space or "wide")
    ]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [study.ask() for _ in range(512)]

    def log_loss(other: Problem, values: dict[str, Any]) -> float:
        rate = values["learning_rate"] * usual_rate(other.width) / usual_rate(problem.width)
        return math.log(other.quality({**values, "learning_rate": rate}))

    every = [problem.space(trial) for trial in drawn]
    losses = np.array([[log_loss(other, values) for other in others] for values in every])
    least = np.full(len(others), np.inf)
    chosen: list[int] = []
    for _ in range(count):
        sums = np.minimum(losses, least).sum(1)
        sums[chosen] = np.inf
        best = int(sums.argmin())
        chosen.append(best)
        least = np.minimum(least, losses[best])
    return [dict(drawn[index].params) for index in chosen]


def regret(
    name: str, label: str, *, trials: int, compute: float, at_once: int, seed: int
) -> tuple[float, int]:
    """By which share a search's result is above the least loss of the space, and its model's proposals."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    of_seed = problems()[name]
    number = seed % len(of_seed)
    problem, contender = of_seed[number], CONTENDERS[label]
    if contender.share:
        found = short_first(problem, contender, seed, compute=min(compute, trials * EVALUATIONS * 0.7))
    else:
        first = portfolio(name, number, contender.portfolio) if contender.portfolio else []
        found = Search(problem, contender, seed, first).run(at_once=at_once, trials=trials, compute=compute)
    if math.isinf(found.loss):  # nothing has ended: the config's values are what is left
        found.loss = problem.quality({})
    return found.loss / least(name, number) - 1, found.by_tpe


def cell(job: tuple[str, str, dict[str, Any], int]) -> dict[str, Any]:
    """The regrets of one contender in one cell of the table, for all seeds."""
    name, label, at, seeds = job
    os.environ["OMP_NUM_THREADS"] = "1"
    results = [regret(name, label, **at, seed=seed) for seed in range(seeds)]
    return {
        "problem": name,
        "contender": label,
        **{key: value if math.isfinite(value) else None for key, value in at.items()},
        "regrets": [round(one, 5) for one, _ in results],
        "by_model": float(np.mean([count for _, count in results])),
    }


def cells(budgets: Sequence[int], at_once: Sequence[int], *, equal_compute: bool) -> list[dict[str, Any]]:
    """Budgets and numbers of trials at once: so many trials, or the compute of as many whole runs."""
    made = []
    for budget in budgets:
        for places in (one for one in at_once if one <= budget):
            made.append({"trials": budget, "compute": math.inf, "at_once": places})
            if equal_compute:
                whole = float(budget * EVALUATIONS)
                made.append({"trials": AS_MANY_AS_FIT, "compute": whole, "at_once": places})
    return made


def applies(contender: Contender, name: str) -> bool:
    """Whether a way to search is one for a problem: some need curves, others an alpha tied to the rank."""
    if contender.alpha and not name.endswith(", tied"):
        return False
    return not (name == "public table" and (contender.share or contender.brackets))


def compare(
    file: Path,
    *,
    labels: Sequence[str],
    names: Sequence[str],
    where: Sequence[dict[str, Any]],
    seeds: int,
    processes: int,
) -> None:
    """Append the cells to `file`, one a line, but for those that a contender does not apply to."""
    jobs = [
        (name, label, at, seeds)
        for at in where
        for name in names
        for label in labels
        if applies(CONTENDERS[label], name)
    ]
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        file.open("a") as lines,
    ):
        for done in pool.map(cell, jobs, chunksize=1):
            lines.write(json.dumps(done) + "\n")
            lines.flush()


def without_search() -> list[str]:
    """Lines that say how far above the least loss of each space the config and the recipe are."""
    lines = []
    for name, of_seed in problems().items():
        if name == "public table":
            for label, values in (("config", {}), ("recipe", {"learning_rate": 2e-4, "lora_r": 16})):
                regrets = [one.quality(values) / one.least() - 1 for one in of_seed]
                lines.append(f"{name}: {label} {np.mean(regrets):.1%}, at most {max(regrets):.1%}")
            continue
        task = of_seed[0].task
        assert isinstance(task, CurveTask)
        floor = of_seed[0].least()
        texts = [
            f"{label}{'' if share == 1 else f', {share:g} times the steps'} {loss / floor - 1:+.1%}"
            for (label, share), loss in task.named.items()
        ]
        lines.append(f"{name}: least {floor:.4f}; {'; '.join(texts)}")
    return lines


def fit_quality() -> list[str]:
    """Lines that say how well the fitted curves predict points that are left out."""
    return [
        f"{name}: {len(task.points)} points; a point left out is off by {task.error[0]:.3f} in the log loss, "
        f"of a standard deviation of {task.error[1]:.3f}; noise of a seed {task.noise[:, -1].std():.3f}"
        for name, task in load_tasks(CURVES).items()
    ]
