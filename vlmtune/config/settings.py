"""`Settings`: every option of a run, typed, checked, and read from flag names or a YAML file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.config import yaml12
from vlmtune.config.flag_table import find_flag, flags, read_file, read_values
from vlmtune.config.options import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
)
from vlmtune.config.search_options import SearchSettings
from vlmtune.config.training_options import TrainingSettings
from vlmtune.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Every option of a run. Settings are pickled into other processes as they are.

    Attributes:
        given_with_resume: flag names of the options that were given together with `resume`; they override
            those of the interrupted run.
    """

    data: DataSettings = field(default_factory=DataSettings)
    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    given_with_resume: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "Settings":
        """Make settings of values by flag name. Other options have their defaults.

        Raises:
            ConfigError: a name is unknown or given under two names, or a value is wrong.
        """
        return build(read_values(values))

    def to_flags(self) -> dict[str, Any]:
        """The values that differ from the defaults, by flag name; `from_flags` reads them back."""
        values = {name: self.value(name) for name in flags()}
        return {name: value for name, value in values.items() if value != flags()[name].default}

    def value(self, name: str) -> Any:
        """The value of an option by its flag name, for code that has only the name, such as a search space.

        An option of TRL that vlmtune does not support has no field here; its value is its default.

        Raises:
            ConfigError: there is no such flag.
        """
        flag = find_flag(name)
        return getattr(getattr(self, flag.group), flag.field) if flag.in_settings else flag.default

    def replace(self, **values: Any) -> "Settings":
        """A copy of these settings with some values changed, given by flag name. They are read as flags are.

        Raises:
            ConfigError: a name is unknown, or a value is wrong or contradicts another one.
        """
        changed = read_values(values)
        return build({**{name: self.value(name) for name in flags()}, **changed}, tuple(changed))

    def save(self, path: str | Path) -> None:
        """Write the YAML file that `--config` and `load` read back to equal settings."""
        Path(path).write_text(yaml12.dump(self.to_flags()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Settings":
        """Settings from a YAML file, such as the config.yaml beside an adapter.

        Raises:
            ConfigError: the file is not there, does not parse, or holds a wrong name or value.
        """
        return build(read_file(str(path)))


def build(values: Mapping[str, Any], names_given: tuple[str, ...] | None = None) -> Settings:
    """Make settings of values by flag name that `read_values` has checked; check them together.

    Args:
        names_given: the flags that the user has set; by default all of `values`.

    Raises:
        ConfigError: two options contradict each other.
    """
    by_group: dict[str, dict[str, Any]] = {group.name: {} for group in dataclasses.fields(Settings)}
    names = tuple(values) if names_given is None else names_given
    for name, flag in flags().items():
        if flag.in_settings:
            value = values.get(name, flag.default)
            by_group[flag.group][flag.field] = list(value) if isinstance(value, list) else value
    settings = Settings(
        data=DataSettings(**by_group["data"]),
        run=RunSettings(**by_group["run"]),
        model=ModelSettings(**by_group["model"]),
        lora=LoraSettings(**by_group["lora"]),
        training=TrainingSettings(**by_group["training"]),
        search=SearchSettings(**by_group["search"]),
        given_with_resume=tuple(name for name in names if name != "resume") if "resume" in names else (),
    )
    check_together(settings)
    return settings


def check_together(settings: Settings) -> None:
    """Raises ConfigError if options that are valid alone contradict each other."""
    data, model, training = settings.data, settings.model, settings.training
    held_out = (0.0 if data.eval_data_path else data.eval_fraction) + data.test_fraction
    if held_out >= 1:
        raise ConfigError(
            f"eval_fraction and test_fraction: together {held_out:g}, which leaves nothing to train on; "
            "they must stay below 1"
        )
    if data.data_weights is not None and len(data.data_weights) != len(data.paths):
        raise ConfigError(
            f"data_weights: {len(data.data_weights)} for {len(data.paths)} data_path; give one for each"
        )
    if model.max_pixels is not None and (model.min_pixels or 0) > model.max_pixels:
        raise ConfigError(f"min_pixels: {model.min_pixels} is more than max_pixels {model.max_pixels}")
    if model.load_in_4bit and model.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit: only one of them can be true")
    trl_switches = (("load_in_4bit", model.load_in_4bit, "nf4"), ("load_in_8bit", model.load_in_8bit, "int8"))
    for name, is_set, meaning in trl_switches:
        if is_set and model.quantization not in (None, meaning):
            raise ConfigError(
                f"{name}: means quantization {meaning}, but quantization is {model.quantization}; keep one"
            )
    # `base_quantization` also knows what load_in_4bit and load_in_8bit mean.
    if model.llm_int8 and model.base_quantization != "int8":
        raise ConfigError(f"llm_int8: needs quantization int8, but quantization is {model.base_quantization}")
    lora = settings.lora
    # The rate is for all trained weights beside the language model, those of modules_to_save among them.
    if lora.vision_learning_rate is not None and not (lora.vision or lora.modules_to_save):
        raise ConfigError(
            "vision_learning_rate: nothing is trained beside the language model; give lora_vision or "
            "lora_modules_to_save, or leave it out"
        )
    if training.router_aux_loss_coef:
        raise ConfigError(
            "router_aux_loss_coef: the routers of a mixture of experts are frozen, so there is no load to "
            "balance; leave it out"
        )
    if training.bf16 and training.fp16:
        raise ConfigError("bf16 and fp16: only one of them can be true")
    if training.early_stopping_patience is not None:
        if settings.search.metric != "eval_loss":
            raise ConfigError(
                "early_stopping_patience: watches eval_loss, but metric is "
                f"{settings.search.metric}; keep one"
            )
        if training.eval_strategy == "no":
            raise ConfigError(
                "early_stopping_patience: needs evaluations, but eval_strategy is no; give steps or epoch"
            )
    if training.eval_strategy == "steps" and training.eval_steps is None:
        raise ConfigError(
            "eval_steps: has no value, but eval_strategy is steps; give a number of steps, or a share "
            "such as 0.25"
        )
