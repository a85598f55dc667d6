"""From the `search_space` of a config to what Optuna is asked for, and to the option values of a trial."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.config.flag_table import flag, flags
from vlmtune.config.flags import Flag
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, nearest
from vlmtune.search.distributions import (
    NUMERIC,
    Categorical,
    Distribution,
    Trial,
    read_categorical,
    read_numeric,
    unknown,
)
from vlmtune.search.expression import Expression

# Points of the space at which expressions are tried before the search starts.
_TRIED = 1000

# Why an option is the same in every trial, and which options those are; besides all of
# DataSettings, RunSettings and SearchSettings.
_FIXED: dict[str, str] = {
    "all trials share one frozen base": (
        "model_name_or_path model_revision dtype attn_implementation quantization llm_int8 load_in_4bit load_in_8bit use_bnb_nested_quant "
        "trust_remote_code"
    ),
    "all trials see the same split and order of rows": "seed full_determinism",
    "all trials are evaluated alike, at the same moments": "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size",
    "it does not change what is learned": (
        "output_dir use_cpu bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_compile "
        "cuda_graphs base_in_memory micro_batch_size "
        "torch_compile_backend torch_compile_mode torch_empty_cache_steps pad_to_multiple_of logging_strategy logging_steps "
        "logging_first_step logging_nan_inf_filter log_on_each_node log_level log_level_replica report_to average_tokens_across_devices"
    ),
}
FIXED: dict[str, str] = {name: reason for reason, names in _FIXED.items() for name in names.split()}


@dataclass(frozen=True)
class Space:
    """What a search varies. Call it with an Optuna trial for that trial's values; it pickles.

    Attributes:
        settings: the config, with the space's constants in it.
        distributions: by option name, in the order of the YAML.
        expressions: options that follow from others, by name, each after those that it needs.
        constants: options that the space sets to one value, for every trial.
        names: the options that vary, expressions included, in the order of the YAML.
    """

    settings: Settings
    distributions: dict[str, Distribution]
    expressions: dict[str, Expression]
    constants: dict[str, Any]
    names: list[str]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], settings: Settings) -> "Space":
        """The space that a config's `search_space` describes, around the config's own values.

        Raises:
            ConfigError: an option is unknown or cannot be searched, a distribution is unknown or given wrong
            arguments, an option
                cannot have a value of its distribution, or an expression does not parse, names no option or
                needs itself.
        """
        if not raw:
            raise ConfigError(
                "search_space: is empty; name at least one option to search, such as `learning_rate: {loguniform: [1e-5, 5e-4]}`"
            )
        distributions: dict[str, Distribution] = {}
        expressions: dict[str, Expression] = {}
        constants: dict[str, Any] = {}
        names: list[str] = []
        for key, entry in raw.items():
            label = f"search_space: {key}"
            option = _searchable(key, label)
            if option.name in names or option.name in constants:
                raise ConfigError(f"{label}: is another name of {option.name}, which is given too; keep one")
            read = _read_entry(entry, option, label)
            if isinstance(read, _Constant):
                constants[option.name] = read.value
                continue
            names.append(option.name)
            if isinstance(read, Expression):
                expressions[option.name] = read
            else:
                distributions[option.name] = read
        space = cls(_with(settings, constants), distributions, _in_order(expressions), constants, names)
        space._check()
        return space

    def __bool__(self) -> bool:
        # Ray asks whether there is a space; without this it would ask for its length, which may be infinite.
        return True

    def __len__(self) -> int:
        """Number of points of a grid.

        Raises:
            TypeError: the space is no grid.
        """
        if not self.is_grid:
            raise TypeError("only a space that is all grid has a number of points")
        return math.prod(len(grid.ends) for grid in self.distributions.values())

    @property
    def is_grid(self) -> bool:
        """Whether the space is a finite list of points, to be run one by one. A space of constants is a grid
        of one point."""
        return all(isinstance(one, Categorical) and one.exhaustive for one in self.distributions.values())

    @property
    def own(self) -> dict[str, Any]:
        """The config's own values of `names`: the first trial."""
        return {name: self.settings.value(name) for name in self.names}

    @property
    def outside(self) -> dict[str, Any]:
        """Those of the config's own values that their distribution does not hold: the first trial has them,
        unseen by the sampler."""
        return {
            name: value
            for name, value in self.own.items()
            if name in self.distributions and not self.distributions[name].contains(value)
        }

    def enqueued(self) -> dict[str, Any]:
        """The config's own values as Optuna keeps them, for `study.enqueue_trial` or OptunaSearch's
        `points_to_evaluate`."""
        kept = [name for name in self.distributions if name not in self.outside]
        return {name: self.distributions[name].parameter(self.own[name]) for name in kept}

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """The option values of a trial, in the order of the YAML, constants last.

        Trial 0 is the config's own values, where the caller has enqueued `enqueued()`; its expressions are
        not evaluated either.

        Raises:
            ConfigError: an expression has no value, or one that its option cannot have.
        """
        first = trial.number == 0
        fixed = self.outside if first else {}
        drawn = {
            name: fixed[name] if name in fixed else one.suggest(trial, name)
            for name, one in self.distributions.items()
        }
        if first:
            return {**self.own, **self._typed(drawn), **self.constants}
        return self._complete(drawn)

    def grid(self) -> list[dict[str, Any]]:
        """Every point of a grid, the last option varying fastest; the config's own values come first where
        they are among them.

        Raises:
            TypeError: the space is no grid.
        """
        if not self.is_grid:
            raise TypeError("only a space that is all grid can be listed")
        points = [self._complete(drawn) for drawn in self._corners()]
        own = {**self.own, **self.constants}
        return sorted(points, key=lambda point: point != own)

    def corners(self) -> Iterator[dict[str, Any]]:
        """The option values of trials at the ends of all distributions: each end once, then combinations, at
        most `_TRIED`."""
        first = {name: one.ends[0] for name, one in self.distributions.items()}
        each = ({**first, name: end} for name, one in self.distributions.items() for end in one.ends)
        return (
            self._complete(drawn)
            for drawn in itertools.chain(each, itertools.islice(self._corners(), _TRIED))
        )

    def _corners(self) -> Iterator[dict[str, Any]]:
        """Every combination of the distributions' ends: of all values of a choice or grid, and both bounds
        of a range."""
        for values in itertools.product(*(one.ends for one in self.distributions.values())):
            yield dict(zip(self.distributions, values, strict=True))

    def _complete(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Drawn values with those that follow from them, typed and in order."""
        known = self._typed(drawn)
        for name, expression in self.expressions.items():
            label = f"search_space: {name}"
            values = {
                variable: known[variable] if variable in known else self.settings.value(variable)
                for variable in expression.variables
            }
            known[name] = _as_option(
                expression.evaluate(values, label),
                flag(name),
                f'{label}: expr "{expression.text}" where {expression.where(values)}',
            )
        return {**{name: known[name] for name in self.names}, **self.constants}

    def _typed(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return {
            name: float(value) if flag(name).kind == "float" and value is not None else value
            for name, value in drawn.items()
        }

    def _check(self) -> None:
        grids = {
            name
            for name, one in self.distributions.items()
            if isinstance(one, Categorical) and one.exhaustive
        }
        others = [name for name in self.distributions if name not in grids]
        if grids and others:
            raise ConfigError(
                f"search_space: {others[0]}: is drawn, but {next(iter(grids))} is a grid; make all of them grids, or none"
            )
        for name, expression in self.expressions.items():
            for variable in expression.variables:
                if variable not in flags():
                    known = [
                        *self.names,
                        *(option.name for option in flags().values() if option.kind in ("int", "float")),
                    ]
                    raise ConfigError(
                        f'search_space: {name}: expr "{expression.text}" names {variable}, which is no option{nearest(variable, known)}'
                    )
        for values in self.corners():
            _with(self.settings, values)


@dataclass(frozen=True)
class _Constant:
    value: Any


def _searchable(key: Any, label: str) -> Flag:
    option = flag(str(key), label)
    if option.group == "search":
        raise ConfigError(
            f"{label}: cannot be searched, as it describes the search itself; set it outside search_space"
        )
    if option.name in FIXED:
        raise ConfigError(
            f"{label}: cannot be searched, as {FIXED[option.name]}; set it outside search_space"
        )
    if option.group in ("data", "run"):
        raise ConfigError(
            f"{label}: cannot be searched, as all trials share the same prepared rows; set it outside search_space"
        )
    return option


def _read_entry(entry: Any, option: Flag, label: str) -> Distribution | Expression | _Constant:
    if not isinstance(entry, dict):
        if isinstance(entry, list) and option.kind != "list":
            raise ConfigError(
                f"{label}: {json.dumps(entry, default=str)} is a list; to search these values write {{choice: [...]}}"
            )
        return _Constant(option.read(entry, label))
    if len(entry) != 1:
        raise ConfigError(
            f"{label}: must hold one distribution, as in {{choice: [8, 16]}}, not {len(entry)}: {', '.join(map(str, entry)) or 'none'}"
        )
    ((kind, arguments),) = entry.items()
    if kind == "expr":
        return Expression.parse(arguments, label)
    if kind in ("choice", "grid"):
        categorical = read_categorical(kind, arguments, option, label)
        return categorical if len(categorical.values) > 1 else _Constant(categorical.values[0])
    if kind not in NUMERIC:
        raise unknown(kind, label)
    return read_numeric(kind, arguments, option, label)


def _in_order(expressions: dict[str, Expression]) -> dict[str, Expression]:
    """The expressions, each after those that it needs."""
    ordered: dict[str, Expression] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " → ".join([*above[above.index(name) :], name])
            raise ConfigError(f"search_space: {name}: its expr needs its own value: {circle}")
        if name in expressions and name not in ordered:
            for variable in expressions[name].variables:
                add(variable, (*above, name))
            ordered[name] = expressions[name]

    for name in expressions:
        add(name, ())
    return ordered


def _as_option(value: Any, option: Flag, label: str) -> Any:
    """An expression's value as the option's type; a float that is whole counts as a whole number."""
    whole = option.kind == "int" and isinstance(value, float) and value.is_integer()
    return option.read(int(value) if whole else value, label)


def _with(settings: Settings, values: dict[str, Any]) -> Settings:
    try:
        return settings.replace(**values)
    except ConfigError as error:
        raise ConfigError(f"search_space: {error}") from None
