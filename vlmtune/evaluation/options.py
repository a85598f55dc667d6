"""Typed options of evaluate, predict and export, and the settings that each of them may override."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from vlmtune.config.flag_table import read_values
from vlmtune.config.options import Dtype, Quantization
from vlmtune.errors import ConfigError, nearest
from vlmtune.evaluation.metrics import METRICS, check_metrics

Split = Literal["test", "eval", "train", "all"]
PredictionFormat = Literal["jsonl", "parquet"]
DEFAULT_NEW_TOKENS = 64
STATE_DICT_FILE = "lora_adapter_state_dict.pt"  # `export` writes it with `state_dict`
MERGED_QUANTIZATIONS = ("none", "nf4", "int8")  # in which `export` can store a merged model


class ModelOverrides(TypedDict, total=False):
    """Settings of the base model and the output folder, by flag name."""

    model_name_or_path: str
    model_revision: str
    trust_remote_code: bool
    quantization: Quantization
    dtype: Dtype
    attn_implementation: str
    use_bnb_nested_quant: bool
    llm_int8: bool
    use_cpu: bool
    overwrite: bool


class PredictOverrides(ModelOverrides, total=False):
    """Settings that `predict` may override, by flag name."""

    columns: dict[str, str]
    image_root: str
    max_pixels: int
    min_pixels: int
    max_image_tiles: int
    allow_outside_paths: bool
    allow_remote_images: bool
    per_device_eval_batch_size: int


class EvaluateOverrides(PredictOverrides, total=False):
    """Settings that `evaluate` may override, by flag name."""

    question: str
    answer_column: str
    group_by: str
    on_bad_row: Literal["error", "skip"]
    cache_dir: str
    cache_size_gb: float
    no_cache: bool
    storage_path: str
    eval_fraction: float
    test_fraction: float
    split_seed: int
    seed: int


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`, see `vlmtune.evaluate`.

    Raises:
        ConfigError: an option is wrong.
    """

    adapter: str
    output_dir: str
    data_path: str | list[str] | None = None
    split: Split | None = None
    metrics: Sequence[str] = tuple(METRICS)
    base_only: bool = False
    compare_base: bool = False
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    overrides: EvaluateOverrides = field(default_factory=EvaluateOverrides)

    def __post_init__(self) -> None:
        check_overrides(self.overrides, EvaluateOverrides)
        check_new_tokens(self.max_new_tokens)
        if self.split is not None and self.split not in get_args(Split):
            raise ConfigError(f"--split: {self.split!r} is not one of {', '.join(get_args(Split))}")
        if self.base_only and self.compare_base:
            raise ConfigError("--base_only and --compare_base: only one of them can be given")
        try:
            check_metrics(self.metrics)
        except ConfigError as error:
            raise ConfigError(f"--metrics {error}") from None


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`, see `vlmtune.predict`.

    Raises:
        ConfigError: an option is wrong.
    """

    adapter: str
    data_path: str
    output_dir: str
    question: str | None = None
    base_only: bool = False
    format: PredictionFormat = "jsonl"
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    overrides: PredictOverrides = field(default_factory=PredictOverrides)

    def __post_init__(self) -> None:
        check_overrides(self.overrides, PredictOverrides)
        check_new_tokens(self.max_new_tokens)
        if self.format not in get_args(PredictionFormat):
            raise ConfigError(
                f"--format: {self.format!r} is not one of {', '.join(get_args(PredictionFormat))}"
            )


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`, see `vlmtune.export`.

    The override `quantization` is that in which the merged model is stored. The merge itself is in full
    precision.

    Raises:
        ConfigError: an option is wrong, or neither `merge` nor `state_dict` is set.
    """

    adapter: str
    output_dir: str
    merge: bool = False
    state_dict: bool = False
    overrides: ModelOverrides = field(default_factory=ModelOverrides)

    def __post_init__(self) -> None:
        check_overrides(self.overrides, ModelOverrides)
        if not (self.merge or self.state_dict):
            raise ConfigError("nothing to export: give --merge, --state_dict, or both")
        quantization = self.overrides.get("quantization", "none")
        if quantization not in MERGED_QUANTIZATIONS:
            raise ConfigError(
                f"--quantization {quantization}: merged weights are stored in full precision, nf4 or int8"
            )
        if quantization != "none" and not self.merge:
            raise ConfigError(f"--quantization {quantization}: is how merged weights are stored; add --merge")


def check_overrides(overrides: Mapping[str, Any], allowed: type[Any]) -> None:
    """Raises ConfigError for a setting that is not among the keys of the TypedDict `allowed`, or is wrong."""
    known = list(allowed.__annotations__)
    for name in overrides:
        if name not in known:
            raise ConfigError(f"--{name}: there is no such option here{nearest(name, known)}")
    read_values(overrides, "--")


def check_new_tokens(number: int) -> None:
    """Raises ConfigError if `max_new_tokens` is below 1."""
    if number < 1:
        raise ConfigError(f"--max_new_tokens: '{number}' is not a whole number of at least 1")
