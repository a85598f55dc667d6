"""The entries of a config's `search_space`: which options can be searched, and what an entry means."""

import json
from dataclasses import dataclass
from typing import Any

from vlmtune.config.flag_table import find_flag
from vlmtune.config.flags import Flag
from vlmtune.errors import ConfigError
from vlmtune.search.distributions import (
    NUMERIC,
    Distribution,
    read_categorical,
    read_numeric,
    unknown_distribution,
)
from vlmtune.search.expression import Expression

# The options that have the same value in every trial, by the reason why, beside all options of the groups
# `data`, `run` and `search`.
_FIXED_BY_REASON: dict[str, tuple[str, ...]] = {
    "all trials share one frozen base": (
        *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "quantization", "llm_int8"),
        *("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "trust_remote_code"),
    ),
    "all trials see the same split and order of rows": ("seed", "full_determinism"),
    "all trials are evaluated alike, at the same moments": (
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
    ),
    "it does not change what is learned": (
        *("output_dir", "use_cpu", "bf16", "fp16", "tf32", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "activation_offloading", "torch_compile", "cuda_graphs"),
        *("base_in_memory", "micro_batch_size", "torch_compile_backend", "torch_compile_mode"),
        *("torch_empty_cache_steps", "pad_to_multiple_of", "logging_strategy", "logging_steps"),
        *("logging_first_step", "logging_nan_inf_filter", "log_on_each_node", "log_level"),
        *("log_level_replica", "report_to", "average_tokens_across_devices"),
    ),
}
FIXED: dict[str, str] = {name: reason for reason, names in _FIXED_BY_REASON.items() for name in names}


@dataclass(frozen=True)
class Constant:
    """An entry with a single value, for every trial."""

    value: Any


def check_searchable(key: Any, label: str) -> Flag:
    """The flag of the option that a key of `search_space` names.

    Args:
        label: the beginning of error messages.

    Raises:
        ConfigError: there is no such option, or it cannot be searched.
    """
    flag = find_flag(str(key), label)
    if flag.group == "search":
        reason = "it describes the search itself"
    elif flag.name in FIXED:
        reason = FIXED[flag.name]
    elif flag.group in ("data", "run"):
        reason = "all trials share the same prepared rows"
    else:
        return flag
    raise ConfigError(f"{label}: cannot be searched, as {reason}; set it outside search_space")


def read_entry(entry: Any, flag: Flag, label: str) -> Distribution | Expression | Constant:
    """What one entry of `search_space` means. Raises ConfigError if it means nothing."""
    if not isinstance(entry, dict):
        if isinstance(entry, list) and flag.kind != "list":
            values = json.dumps(entry, default=str)
            raise ConfigError(f"{label}: {values} is a list; to search these values write {{choice: [...]}}")
        return Constant(flag.read(entry, label))
    if len(entry) != 1:
        keys = ", ".join(map(str, entry)) or "none"
        raise ConfigError(
            f"{label}: must hold one distribution, as in {{choice: [8, 16]}}, not {len(entry)}: {keys}"
        )
    ((kind, arguments),) = entry.items()
    if kind == "expr":
        return Expression.parse(arguments, label)
    if kind in ("choice", "grid"):
        categorical = read_categorical(kind, arguments, flag, label)
        return categorical if len(categorical.values) > 1 else Constant(categorical.values[0])
    if kind not in NUMERIC:
        raise unknown_distribution(kind, label)
    return read_numeric(kind, arguments, flag, label)


def sort_expressions(expressions: dict[str, Expression]) -> dict[str, Expression]:
    """The expressions in an order in which each comes after those that it needs.

    Raises:
        ConfigError: an expression needs its own value.
    """
    ordered: dict[str, Expression] = {}

    def add(name: str, needed_by: tuple[str, ...]) -> None:
        if name in needed_by:
            circle = " → ".join([*needed_by[needed_by.index(name) :], name])
            raise ConfigError(f"search_space: {name}: its expr needs its own value: {circle}")
        if name in expressions and name not in ordered:
            for variable in expressions[name].variables:
                add(variable, (*needed_by, name))
            ordered[name] = expressions[name]

    for name in expressions:
        add(name, ())
    return ordered
