"""The distributions of searched options: they have Ray Tune's names, and Optuna draws from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from vlmtune.config.flags import Flag
from vlmtune.errors import ConfigError, nearest

# The arguments of each numeric distribution. Names, order and meaning are Ray Tune's.
NUMERIC = {
    "uniform": "[lower, upper]",
    "quniform": "[lower, upper, quantum]",
    "loguniform": "[lower, upper]",
    "qloguniform": "[lower, upper, quantum]",
    "randint": "[lower, upper]",
    "lograndint": "[lower, upper]",
}
NAMES = ("choice", *NUMERIC, "grid", "expr")  # grid is Ray Tune's grid_search; expr is an `Expression`


class Trial(Protocol):
    """The methods of `optuna.Trial`, or of Ray's wrapper around one, that are used here."""

    @property
    def number(self) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Categorical:
    """One of several values without order.

    Attributes:
        exhaustive: whether every value is run, as in a grid.
    """

    values: tuple[Any, ...]
    exhaustive: bool

    @property
    def ends(self) -> tuple[Any, ...]:
        """The extreme values, at which the space is checked."""
        return self.values

    @property
    def _labels(self) -> list[Any]:
        # Optuna stores no lists and mappings, so they are JSON there.
        return [
            value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
            for value in self.values
        ]

    def suggest(self, trial: Trial, name: str) -> Any:
        """Draw a value of the option `name` for `trial`."""
        labels = self._labels
        return self.values[labels.index(trial.suggest_categorical(name, labels))]

    def contains(self, value: Any) -> bool:
        """Whether `value` could be drawn."""
        return value in self.values

    def parameter(self, value: Any) -> Any:
        """What Optuna stores for a contained value."""
        return self._labels[self.values.index(value)]


@dataclass(frozen=True)
class Numeric:
    """A number from `low` to `high`, both included, uniform on a linear or a logarithmic scale.

    With a quantum, every value is a multiple of it. With `whole`, values are integers.
    """

    low: float
    high: float
    quantum: float | None
    log: bool
    whole: bool

    @property
    def ends(self) -> tuple[Any, ...]:
        """The extreme values, at which the space is checked."""
        return (self.low, self.high)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Draw a value of the option `name` for `trial`."""
        if self.log and self.quantum:  # Optuna has no logarithmic scale with a step
            return self._multiple(trial.suggest_float(name, self.low, self.high, log=True))
        if self.whole:
            return trial.suggest_int(
                name, int(self.low), int(self.high), step=int(self.quantum or 1), log=self.log
            )
        value = trial.suggest_float(name, self.low, self.high, step=self.quantum, log=self.log)
        return self._multiple(value) if self.quantum else value

    def contains(self, value: Any) -> bool:
        """Whether `value` could be drawn."""
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not self.low <= value <= self.high
        ):
            return False
        return (not self.whole or float(value).is_integer()) and (
            not self.quantum or self._multiple(value) == value
        )

    def parameter(self, value: Any) -> Any:
        """What Optuna stores for a contained value."""
        return int(value) if self.whole else value

    def _multiple(self, value: float) -> float:
        quantum = Decimal(str(self.quantum))
        multiple = min(
            max(round(Decimal(str(value)) / quantum) * quantum, Decimal(str(self.low))),
            Decimal(str(self.high)),
        )
        return int(multiple) if self.whole else float(multiple)


Distribution = Categorical | Numeric


def read_categorical(kind: str, arguments: Any, flag: Flag, label: str) -> Categorical:
    """Read the `arguments` of a choice or grid, each as the type of the option that `flag` sets.

    Raises:
        ConfigError: they are no list or an empty one, repeat a value, or hold one that the option cannot
            have.
    """
    if not isinstance(arguments, list) or not arguments:
        raise ConfigError(
            f"{label}: {kind} takes a list of values, as in {{{kind}: [8, 16]}}, "
            f"not {json.dumps(arguments, default=str)}"
        )
    values = [flag.read(value, f"{label}: {kind}") for value in arguments]
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{label}: {kind} holds {json.dumps(value)} twice")
    return Categorical(tuple(values), exhaustive=kind == "grid")


def read_numeric(kind: str, arguments: Any, flag: Flag, label: str) -> Numeric:
    """Read the `arguments` of a range, for an option that is a number.

    Raises:
        ConfigError: the arguments are wrong, or the range has values that the option cannot have.
    """
    if flag.kind not in ("int", "float"):
        raise ConfigError(f"{label}: {kind} draws numbers, which {flag.name} does not take; use choice")
    needed = len(NUMERIC[kind].split())
    numbers = arguments if isinstance(arguments, list) else []
    if len(numbers) != needed or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    ):
        raise ConfigError(
            f"{label}: {kind} takes {needed} numbers, {NUMERIC[kind]}, "
            f"not {json.dumps(arguments, default=str)}"
        )
    low, high = numbers[:2]
    quantum = numbers[2] if needed == 3 else None
    log, randint = "log" in kind, kind.endswith("randint")
    if low >= high:
        raise ConfigError(f"{label}: {kind}'s lower bound {low} must be below its upper bound {high}")
    if log and low <= 0:
        raise ConfigError(
            f"{label}: {kind}'s lower bound {low} must be above 0, as a logarithmic scale has no 0"
        )
    if quantum is not None and quantum <= 0:
        raise ConfigError(f"{label}: {kind}'s quantum {quantum} must be above 0")
    if (randint or flag.kind == "int") and not all(float(number).is_integer() for number in numbers):
        raise ConfigError(f"{label}: {kind} needs whole numbers here, not {json.dumps(arguments)}")
    if flag.kind == "int" and kind in ("uniform", "loguniform"):
        instead = "randint or quniform" if kind == "uniform" else "lograndint or qloguniform"
        raise ConfigError(
            f"{label}: {kind} draws fractions, but {flag.name} is a whole number; use {instead}"
        )
    if quantum is not None and any(Decimal(str(number)) % Decimal(str(quantum)) for number in (low, high)):
        raise ConfigError(
            f"{label}: {kind}'s bounds {low} and {high} must be multiples of its quantum {quantum}"
        )
    if randint:
        high -= 1  # Ray Tune never draws randint's upper bound
    whole = randint or flag.kind == "int"
    for end in (low, high):
        flag.read(int(end) if whole else end, f"{label}: {kind}")
    return Numeric(low, high, quantum, log, whole)


def unknown_distribution(kind: Any, label: str) -> ConfigError:
    """The error for an unknown distribution."""
    return ConfigError(
        f"{label}: there is no distribution {kind!r}{nearest(str(kind), NAMES)}; there are {', '.join(NAMES)}"
    )
