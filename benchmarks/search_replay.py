"""Whole searches in virtual time, over learning curves that are known.

Samplers and schedulers are those of vlmtune, called as Tune calls them; only training is looked up. Trials
that run at once advance by one evaluation at a time, as in an engine, and a free place is filled before the
next evaluation. The unit of compute is one evaluation interval, an eighth of a run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler
from search_curves import CurveTask, TableTask
from search_tasks import EVALUATIONS, SHORT, TARGETS

from vlmtune.compat.ray_tune import optuna_study
from vlmtune.config.settings import Settings
from vlmtune.packed.messages import TRIAL_ID
from vlmtune.search.first_points import STARTUP_TRIALS, TPE, at_share
from vlmtune.search.isolated_trial import ORIGIN, trial_values
from vlmtune.search.searcher import TrialSearcher, make_tpe
from vlmtune.search.space import Space
from vlmtune.search.tuner import make_scheduler
from vlmtune.search.warm_start import TRIALS_PER_EARLIER_POINT, EarlierTrials
from vlmtune.training.meter import EVALUATION_NUMBER

Sampler = Callable[[int], optuna.samplers.BaseSampler]
NEVER = {"early_stopping": "none"}
AS_MANY_AS_FIT = 10**6


@dataclass(frozen=True)
class Contender:
    """A way to search.

    Attributes:
        sampler: makes Optuna's sampler from a seed; None: vlmtune's own TPE.
        startup: trials that end before the sampler proposes, where the first points are guided.
        needs: trials that end before the sampler's own model proposes; before, it draws at random.
        guided: whether the learning rates of the first trials are drawn around the usual one, and the recipe
            is among them, as `FirstPoints` does.
        stopping: options of early stopping that differ from the defaults.
        portfolio: points tried after the baseline that were best on the other tasks.
        misled: whether an earlier search of another problem says that the lowest values are the best.
        share: of the steps; above 0, most trials are short runs with a whole schedule of their own, and the
            best of them are then run whole.
        brackets: above 0, Hyperband with so many of them stops trials early: Ray Tune's asynchronous one,
            whose trials are drawn into brackets that first compare after 1, 2, 4 … evaluations.
        alpha: flags of LoRA's scaling where it is not that of the space.
    """

    sampler: Sampler | None = None
    startup: int = STARTUP_TRIALS
    needs: float = 0
    guided: bool = False
    stopping: Mapping[str, Any] = field(default_factory=dict)
    portfolio: int = 0
    misled: bool = False
    share: float = 0.0
    brackets: int = 0
    alpha: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A task with a search space.

    Attributes:
        settings: the config, with its search space.
        width: of the model, for the usual learning rate.
        stops: whether curves are known, so that trials can be stopped early.
    """

    task: CurveTask | TableTask
    settings: Settings
    width: int
    stops: bool = True

    @property
    def space(self) -> Space:
        return Space.parse(self.settings.search.search_space or {}, self.settings)

    def point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The axes of the curves from a trial's values."""
        settings = self.settings.replace(**values)
        targets = "attention" if settings.lora.target_modules == TARGETS["attention"] else "all"
        scale = settings.lora.alpha
        return {
            "learning_rate": settings.training.learning_rate,
            "lora_r": settings.lora.r,
            "lora_alpha": scale * math.sqrt(settings.lora.r) if settings.lora.use_rslora else scale,
            "lora_dropout": settings.lora.dropout,
            "targets": targets,
        }

    def with_alpha(self, flags: Mapping[str, Any]) -> "Problem":
        """The problem with other flags of LoRA's scaling, constants instead of the space's own."""
        if not flags:
            return self
        entries = {**(self.settings.search.search_space or {})}
        entries.pop("lora_alpha")
        return replace(self, settings=self.settings.replace(**flags, search_space=entries))

    def quality(self, values: Mapping[str, Any]) -> float:
        """The loss of the best checkpoint of a run with these values, without the noise of training."""
        return float(self.task.curve(self.point(values)).min())

    def least(self, draws: int = 4000) -> float:
        """The least loss in the space, of so many random points and the neighbors of the best."""
        space, random = self.space, np.random.default_rng(0)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        values = [space(study.ask()) for _ in range(draws // 4)]
        found = sorted((self.quality(one), number) for number, one in enumerate(values))
        best = found[0][0]
        for _, number in found[:8]:
            for factor in np.exp(random.normal(0, 0.25, 60)):
                moved = dict(values[number])
                rates = space.distributions.get("learning_rate")
                if rates is not None:
                    moved["learning_rate"] = float(np.clip(moved["learning_rate"] * factor, *rates.ends))
                best = min(best, self.quality(moved))
        return best


@dataclass
class Outcome:
    """What a search found: the chosen trial's loss without noise, and its number of proposals of TPE."""

    loss: float = math.inf
    by_tpe: int = 0
    trials: int = 0
    compute: float = 0.0


class Search:
    """One search in virtual time.

    Args:
        portfolio: Optuna's parameters of the points that are tried after the baseline.
    """

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        seed: int,
        portfolio: Sequence[dict[str, Any]] = (),
    ) -> None:
        problem = problem.with_alpha(contender.alpha)
        self.problem, self.contender, self.seed = problem, contender, seed
        settings = problem.settings.replace(
            recipe=problem.settings.search.recipe if contender.guided else None
        )
        space = Space.parse(settings.search.search_space or {}, settings)
        startup = contender.startup
        with patch(
            "vlmtune.search.searcher.make_tpe",
            (lambda seed, startup: contender.sampler(seed)) if contender.sampler else make_tpe,
        ):
            self.searcher = TrialSearcher(
                space,
                metric="eval_loss",
                mode="min",
                seed=seed,
                width=problem.width if contender.guided else None,
                n_startup_trials=startup if contender.guided else 0,
                earlier=misleading(space, settings) if contender.misled else None,
            )
        for parameters in portfolio:  # OptunaSearch has enqueued the baseline
            optuna_study(self.searcher).enqueue_trial(parameters)
        stopping = contender.stopping if problem.stops else NEVER
        if problem.stops and contender.brackets:
            np.random.seed(seed)  # Ray Tune draws the bracket of a trial from numpy's global generator
            self.scheduler: Any = AsyncHyperBandScheduler(
                time_attr=EVALUATION_NUMBER,
                max_t=EVALUATIONS,
                reduction_factor=2,
                brackets=contender.brackets,
            )
        else:
            self.scheduler = make_scheduler(settings.replace(**stopping), space)
        self.scheduler.set_search_properties("eval_loss", "min")

    def run(self, *, at_once: int, trials: int, compute: float) -> Outcome:
        """Search until so many trials have ended or so much compute is spent."""
        controller: Any = None  # ASHA does not use it
        running: dict[str, tuple[Any, Iterator[tuple[int, float]]]] = {}
        outcome, best, ended = Outcome(), math.inf, 0
        while outcome.compute < compute:
            while len(running) < at_once and outcome.trials < trials:
                name = f"t{outcome.trials}"
                outcome.trials += 1
                config = self.searcher.suggest(name)
                outcome.by_tpe += config[ORIGIN] == TPE and ended >= self.contender.needs
                config[TRIAL_ID] = name
                trial: Any = SimpleNamespace(trial_id=name, config=config, status="RUNNING")
                self.scheduler.on_trial_add(controller, trial)
                noise = self.seed * 1009 + outcome.trials * 7
                curve = self.problem.task.curve(self.problem.point(trial_values(config)), noise)
                judged = np.minimum.accumulate(curve)  # a trial is judged by its best checkpoint
                running[name] = trial, iter(enumerate(judged.tolist(), 1))
            if not running:
                break
            for name, (trial, evaluations) in list(running.items()):
                number, loss = next(evaluations)
                outcome.compute += 1
                result = {
                    "eval_loss": loss,
                    EVALUATION_NUMBER: number,
                    "step": number,
                    "max_steps": EVALUATIONS,
                }
                last = number == EVALUATIONS
                if last:
                    self.scheduler.on_trial_complete(controller, trial, result)
                if last or self.scheduler.on_trial_result(controller, trial, result) == "STOP":
                    self.searcher.on_trial_complete(name, result)
                    del running[name]
                    ended += 1
                    if last and loss < best:
                        best, outcome.loss = loss, self.problem.quality(trial_values(trial.config))
                else:
                    self.searcher.on_trial_result(name, result)
                if outcome.compute >= compute:
                    break
        return outcome


def misleading(space: Space, settings: Settings) -> EarlierTrials:
    """What an earlier search takes of the trials, with the lowest values of the space as its best."""
    lowest = {name: at_share(one, 0.0) for name, one in space.distributions.items()}
    count = max(1, settings.search.num_samples // TRIALS_PER_EARLIER_POINT)
    return EarlierTrials(points=[lowest] * count)


def short_first(problem: Problem, contender: Contender, seed: int, *, compute: float) -> Outcome:
    """Short runs with schedules of their own for half of the compute; the best of them are then run whole."""
    assert isinstance(problem.task, CurveTask) and contender.share in SHORT
    settings = problem.settings.replace(recipe=problem.settings.search.recipe)
    space = Space.parse(settings.search.search_space or {}, settings)
    searcher = TrialSearcher(space, metric="eval_loss", mode="min", seed=seed, width=problem.width)
    outcome, tried = Outcome(), []
    while outcome.compute + contender.share * EVALUATIONS <= compute / 2:
        name = f"t{outcome.trials}"
        outcome.trials += 1
        values = trial_values(searcher.suggest(name))
        noise = seed * 1009 + outcome.trials * 7
        loss = problem.task.short(problem.point(values), contender.share, noise)
        report = {"eval_loss": loss, EVALUATION_NUMBER: 1, "step": 1, "max_steps": 1}
        searcher.on_trial_complete(name, report)
        tried.append((loss, noise, values))
        outcome.compute += contender.share * EVALUATIONS
    best = math.inf
    for _, noise, values in sorted(tried, key=lambda one: one[0]):
        if outcome.compute + EVALUATIONS > compute:
            break
        outcome.compute += EVALUATIONS
        observed = float(problem.task.curve(problem.point(values), noise + 1).min())
        if observed < best:
            best, outcome.loss = observed, problem.quality(values)
    return outcome
