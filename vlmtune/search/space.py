"""The search space: the distributions that Optuna draws from, and the option values of a trial."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.config.flag_table import find_flag, flags
from vlmtune.config.flags import Flag
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, nearest
from vlmtune.search.distributions import Categorical, Distribution, Trial
from vlmtune.search.expression import Expression
from vlmtune.search.space_entries import Constant, check_searchable, read_entry, sort_expressions

MAX_CORNERS = 1000  # combinations of extreme values at which expressions are checked before the search starts


@dataclass(frozen=True)
class Space:
    """The options that a search varies. A call with an Optuna trial returns that trial's values.

    Can be pickled.

    Attributes:
        settings: the config, with the space's constants in it.
        distributions: by flag name, in the order of the YAML file.
        expressions: by flag name, for options that are computed from others. Each one comes after the options
            that it needs.
        constants: options that the space sets to one value for every trial.
        names: the options that vary, including those with an expression, in the order of the YAML file.
    """

    settings: Settings
    distributions: dict[str, Distribution]
    expressions: dict[str, Expression]
    constants: dict[str, Any]
    names: list[str]

    @classmethod
    def parse(cls, search_space: Mapping[str, Any], settings: Settings) -> "Space":
        """Parse the `search_space` of a config.

        Raises:
            ConfigError: an option is unknown or cannot be searched; a distribution is unknown or has wrong
                arguments; an option cannot have a value of its distribution; or an expression does not parse,
                names no option or needs its own value.
        """
        if not search_space:
            raise ConfigError(
                "search_space: is empty; name at least one option to search, such as "
                "`learning_rate: {loguniform: [1e-5, 5e-4]}`"
            )
        distributions: dict[str, Distribution] = {}
        expressions: dict[str, Expression] = {}
        constants: dict[str, Any] = {}
        names: list[str] = []
        for key, entry in search_space.items():
            label = f"search_space: {key}"
            flag = check_searchable(key, label)
            if flag.name in names or flag.name in constants:
                raise ConfigError(f"{label}: is another name of {flag.name}, which is given too; keep one")
            parsed = read_entry(entry, flag, label)
            if isinstance(parsed, Constant):
                constants[flag.name] = parsed.value
                continue
            names.append(flag.name)
            if isinstance(parsed, Expression):
                expressions[flag.name] = parsed
            else:
                distributions[flag.name] = parsed
        space = cls(
            _replace(settings, constants), distributions, sort_expressions(expressions), constants, names
        )
        check_space(space)
        return space

    def __bool__(self) -> bool:
        # Ray asks whether there is a space. Without this method Python would ask for its length, which only a
        # grid has.
        return True

    def __len__(self) -> int:
        """Number of points of a grid.

        Raises:
            TypeError: the space is not a grid.
        """
        if not self.is_grid:
            raise TypeError("only a space that is all grid has a number of points")
        return math.prod(len(grid.ends) for grid in self.distributions.values())

    @property
    def is_grid(self) -> bool:
        """Whether the space is a finite list of points. A space of constants is a grid of one point."""
        return all(
            isinstance(distribution, Categorical) and distribution.exhaustive
            for distribution in self.distributions.values()
        )

    @property
    def baseline(self) -> dict[str, Any]:
        """The baseline: the config's values of `names`, which are those of the first trial."""
        return {name: self.settings.value(name) for name in self.names}

    @property
    def baseline_outside(self) -> dict[str, Any]:
        """The baseline's values that lie outside their distribution. Optuna's sampler does not see them."""
        return {
            name: value
            for name, value in self.baseline.items()
            if name in self.distributions and not self.distributions[name].contains(value)
        }

    def baseline_parameters(self) -> dict[str, Any]:
        """The baseline as Optuna stores it, for OptunaSearch's `points_to_evaluate`."""
        baseline, outside = self.baseline, self.baseline_outside
        return {
            name: distribution.parameter(baseline[name])
            for name, distribution in self.distributions.items()
            if name not in outside
        }

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """The option values of a trial, in the order of the YAML file, constants last.

        Trial 0 is the baseline, if the caller has enqueued `baseline_parameters()`. All its values are the
        config's, so its expressions are not evaluated.

        Raises:
            ConfigError: an expression has no value, or one that its option cannot have.
        """
        is_baseline = trial.number == 0
        fixed = self.baseline_outside if is_baseline else {}
        drawn = {
            name: fixed[name] if name in fixed else distribution.suggest(trial, name)
            for name, distribution in self.distributions.items()
        }
        if is_baseline:
            return {**self.baseline, **_typed(drawn), **self.constants}
        return self.complete(drawn)

    def grid(self) -> list[dict[str, Any]]:
        """Every point of a grid, the last option varying fastest; the baseline comes first if it is one.

        Raises:
            TypeError: the space is not a grid.
        """
        if not self.is_grid:
            raise TypeError("only a space that is all grid can be listed")
        points = [self.complete(drawn) for drawn in self._combinations()]
        baseline = {**self.baseline, **self.constants}
        return sorted(points, key=lambda point: point != baseline)

    def corners(self) -> Iterator[dict[str, Any]]:
        """The option values at the ends of the distributions: each end once, then some combinations."""
        first = {name: distribution.ends[0] for name, distribution in self.distributions.items()}
        each = (
            {**first, name: end}
            for name, distribution in self.distributions.items()
            for end in distribution.ends
        )
        combinations = itertools.islice(self._combinations(), MAX_CORNERS)
        return (self.complete(drawn) for drawn in itertools.chain(each, combinations))

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Every combination of ends: all values of a choice or grid, and both bounds of a range."""
        for values in itertools.product(*(distribution.ends for distribution in self.distributions.values())):
            yield dict(zip(self.distributions, values, strict=True))

    def complete(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Add the values of expressions and constants to drawn values, in the order of the YAML file."""
        values = _typed(drawn)
        for name, expression in self.expressions.items():
            label = f"search_space: {name}"
            variables = {
                variable: values[variable] if variable in values else self.settings.value(variable)
                for variable in expression.variables
            }
            where = f'{label}: expr "{expression.text}" where {expression.where(variables)}'
            values[name] = _read_result(expression.evaluate(variables, label), find_flag(name), where)
        return {**{name: values[name] for name in self.names}, **self.constants}


def check_space(space: Space) -> None:
    """Raises ConfigError for a mix of grids and others, an unknown variable, or values that do not fit."""
    grids = [
        name
        for name, distribution in space.distributions.items()
        if isinstance(distribution, Categorical) and distribution.exhaustive
    ]
    others = [name for name in space.distributions if name not in grids]
    if grids and others:
        raise ConfigError(
            f"search_space: {others[0]}: is drawn, but {grids[0]} is a grid; make all of them grids, or none"
        )
    for name, expression in space.expressions.items():
        for variable in expression.variables:
            if variable not in flags():
                numbers = (flag.name for flag in flags().values() if flag.kind in ("int", "float"))
                raise ConfigError(
                    f'search_space: {name}: expr "{expression.text}" names {variable}, which is no option'
                    f"{nearest(variable, [*space.names, *numbers])}"
                )
    for values in space.corners():
        _replace(space.settings, values)


def _typed(drawn: dict[str, Any]) -> dict[str, Any]:
    """Drawn values with floats for options that are floats."""
    return {
        name: float(value) if find_flag(name).kind == "float" and value is not None else value
        for name, value in drawn.items()
    }


def _read_result(value: Any, flag: Flag, label: str) -> Any:
    """An expression's value as the option's type; a whole float counts as a whole number."""
    whole = flag.kind == "int" and isinstance(value, float) and value.is_integer()
    return flag.read(int(value) if whole else value, label)


def _replace(settings: Settings, values: dict[str, Any]) -> Settings:
    try:
        return settings.replace(**values)
    except ConfigError as error:
        raise ConfigError(f"search_space: {error}") from None
