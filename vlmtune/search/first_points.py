"""The points that a search tries before it has results to learn from.

The baseline (the config's values), the community recipe, then points spread over the space, denser around the
learning rate that usually suits a model of this width (hidden size). A search of 16 trials that all run at
once tries nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from vlmtune.config.flag_table import find_flag
from vlmtune.errors import ConfigError
from vlmtune.search.distributions import Categorical, Distribution, Numeric
from vlmtune.search.space import Space

# A trial's origin: where its values come from. The column `origin` of `trials.parquet` has these texts.
BASELINE, RECIPE, SPREAD, GRID = "baseline", "recipe", "spread", "grid"
TPE = "tpe"  # proposed by Optuna's sampler TPE, which learns from the results so far
EARLIER = "earlier"  # a point of an earlier search (`--warm_start`)
REQUESTED = "requested"  # values that a person asked for

# The learning rate that usually suits a LoRA adapter: 5e-4 for a model of width 2000, less for a wider one.
# The form and the exponent are those of Thinking Machines' "LoRA Without Regret" (2025) for Llama.
USUAL_RATE, USUAL_WIDTH, WIDTH_EXPONENT = 5e-4, 2000, 0.781
LOG_RATE_DEVIATION = math.log(3.0)  # standard deviation of the logarithm of the rate around the usual one
TRIALS_WORTH_A_RECIPE = 8  # fewer trials are not worth one more run to compare them with
STARTUP_TRIALS = 10  # Optuna's n_startup_trials: trials that must have ended before TPE proposes any
UNIFORM_EVERY = 3  # every third point draws its rate uniformly, in case the usual rate is wrong here


def usual_rate(width: int) -> float:
    """The learning rate that usually suits adapters of a model with this hidden size."""
    return USUAL_RATE * float((USUAL_WIDTH / width) ** WIDTH_EXPONENT)


def recipe_values(space: Space) -> dict[str, Any] | None:
    """The recipe's value of every option that it or the space names; None if there is no recipe.

    Raises:
        ConfigError: the recipe names an unknown option, or a value that it cannot have.
    """
    recipe = space.settings.search.recipe
    if recipe is None:
        return None
    try:
        settings = space.settings.replace(**recipe)
    except ConfigError as error:
        raise ConfigError(f"recipe: {error}") from None
    names = [*space.names, *(find_flag(name).name for name in recipe), *space.constants]
    return {name: settings.value(name) for name in dict.fromkeys(names)}


def recipe_parameters(space: Space) -> dict[str, Any] | None:
    """The recipe as Optuna's parameters, where the space contains it; else None.

    The space contains it if each of its values can be drawn, or equals the config's value of an option that
    is not searched.
    """
    recipe = recipe_values(space)
    if recipe is None or space.is_grid:
        return None
    fixed = {name: value for name, value in recipe.items() if name not in space.names}
    if any(space.settings.value(name) != value for name, value in fixed.items()):
        return None
    drawn = {name: recipe[name] for name in space.distributions}
    if not all(distribution.contains(drawn[name]) for name, distribution in space.distributions.items()):
        return None
    point = space.complete(drawn)
    if any(point[name] != recipe[name] for name in space.names):
        return None
    return {name: distribution.parameter(drawn[name]) for name, distribution in space.distributions.items()}


def recipe_outside_space(space: Space) -> dict[str, Any] | None:
    """The recipe's option values, if they need one more trial beside the search.

    None if the recipe is a point of the space or the grid, or equals the baseline, and for a search of few
    trials.
    """
    recipe = recipe_values(space)
    trials = len(space) if space.is_grid else space.settings.search.num_samples
    if recipe is None or trials < TRIALS_WORTH_A_RECIPE or recipe_parameters(space) is not None:
        return None
    baseline = {name: space.settings.value(name) for name in recipe}
    points = [*space.grid()] if space.is_grid else []
    known = [baseline, *({**baseline, **point} for point in points)]
    return None if recipe in known else recipe


def trial_count(space: Space) -> int:
    """Number of trials that a search runs, including the trial of a recipe outside its space."""
    trials = len(space) if space.is_grid else space.settings.search.num_samples
    return trials + (recipe_outside_space(space) is not None)


@dataclass(frozen=True)
class FirstPoints:
    """Points spread over a space, as Optuna's parameters.

    They are a scrambled Sobol sequence: any few points in a row are spread evenly over every option.

    Attributes:
        distributions: the space's distributions, by flag name.
        usual_rate: the usual learning rate for the model; None if the width of the model is not known.
        seed: seed of the scrambling.
    """

    distributions: Mapping[str, Distribution]
    usual_rate: float | None
    seed: int

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The parameters of the point with this number, counted from 0."""
        from torch.quasirandom import SobolEngine

        sequence = SobolEngine(len(self.distributions), scramble=True, seed=self.seed)
        shares = sequence.fast_forward(number).draw(1)[0].tolist()
        parameters = {}
        for share, (name, distribution) in zip(shares, self.distributions.items(), strict=True):
            if name == "learning_rate" and number % UNIFORM_EVERY != UNIFORM_EVERY - 1:
                share = self._towards_usual_rate(distribution, share)
            parameters[name] = at_share(distribution, share)
        return parameters

    def _towards_usual_rate(self, rates: Distribution, share: float) -> float:
        """Map uniform shares of the range of rates to shares whose rates are normal around the usual one."""
        if self.usual_rate is None or not isinstance(rates, Numeric) or not rates.log:
            return share
        low, high = math.log(rates.low), math.log(rates.high)
        normal = NormalDist(min(max(math.log(self.usual_rate), low), high), LOG_RATE_DEVIATION)
        below, above = normal.cdf(low), normal.cdf(high)
        quantile = min(max(below + share * (above - below), 1e-12), 1 - 1e-12)
        return min(max((normal.inv_cdf(quantile) - low) / (high - low), 0.0), 1.0)


def at_share(distribution: Distribution, share: float) -> Any:
    """The parameter at a share, from 0 to 1, of the range of a distribution."""
    if isinstance(distribution, Categorical):
        return distribution.parameter(
            distribution.values[min(int(share * len(distribution.values)), len(distribution.values) - 1)]
        )
    if distribution.log:
        low, high = math.log(distribution.low), math.log(distribution.high)
        value = min(max(math.exp(low + share * (high - low)), distribution.low), distribution.high)
        return round(value) if distribution.whole else value
    if distribution.quantum or distribution.whole:
        step = distribution.quantum or 1
        steps = min(
            int(share * ((distribution.high - distribution.low) // step + 1)),
            int((distribution.high - distribution.low) // step),
        )
        value = distribution.low + steps * step
        return int(value) if distribution.whole else value
    return distribution.low + share * (distribution.high - distribution.low)


def proposals_text(origins: Sequence[str]) -> str:
    """Where the values of a search's trials come from, in a few words."""
    by_tpe = origins.count(TPE)
    if GRID in origins:
        return f"{origins.count(GRID)} points of the grid"
    others = ((SPREAD, "spread over the space"), (EARLIER, "of earlier searches"))
    texts = [f"{origins.count(kind)} {words}" for kind, words in others if kind in origins]
    fixed = " and ".join(kind for kind in (BASELINE, RECIPE) if kind in origins)
    text = f"{by_tpe} of {len(origins)} by TPE, {', '.join([*texts, fixed])}"
    if not by_tpe and len(origins) > STARTUP_TRIALS:
        text += (
            f"; all had begun before {STARTUP_TRIALS} had ended: a smaller --max_concurrent_trials lets "
            "TPE propose (replayed searches with 4 at once ended 8 % nearer to the best than with 16)"
        )
    return text
