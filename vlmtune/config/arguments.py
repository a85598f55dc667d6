"""Every option of vlmtune, in four dataclasses.

The names are TRL's own wherever TRL has one. `vlmtune.config` turns these into flags and YAML keys.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from vlmtune.errors import ConfigError

Quantization = Literal["none", "nf4", "int8", "fp8"]

# Older names of the field, accepted wherever the name on the right is.
ALIASES = {"max_seq_length": "max_length", "lora_rank": "lora_r", "target_modules": "lora_target_modules"}

# Where neither a config nor a model is given: the settings of the instruction-tuning command that vlmtune
# replaces.
PRESET: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "quantization": "int8",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def _help(text: str, *choices: str) -> dict[str, Any]:
    """A field's metadata in the form that `transformers.HfArgumentParser` reads."""
    return {"help": text, "choices": list(choices)} if choices else {"help": text}


@dataclass
class DataArguments:
    """Where the rows come from, and how they are checked and split."""

    _argument_group_name: ClassVar[str] = "data"

    data_path: str | None = field(
        default=None,
        metadata=_help(
            "Training data: a frames folder, JSON, JSONL or Parquet, a saved dataset, or a dataset's name on the Hub."
        ),
    )
    eval_data_path: str | None = field(
        default=None, metadata=_help("Evaluation data, if it is not to be split off from data_path.")
    )
    eval_fraction: float = field(
        default=0.1,
        metadata=_help(
            "Share of data_path that is evaluated on during training and search, split by image content."
        ),
    )
    test_fraction: float = field(
        default=0.1,
        metadata=_help("Share of data_path that no search sees; the headline numbers come from it."),
    )
    group_by: str | None = field(
        default=None,
        metadata=_help("Column whose rows stay together in the split, such as a camera or a sequence."),
    )
    image_root: str | None = field(
        default=None,
        metadata=_help("Folder that image paths are relative to. By default, the file that names them."),
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata=_help("What a row that cannot be used does: stop the run, or go to bad_rows.jsonl."),
    )
    on_long_row: Literal["error", "skip"] = field(
        default="error", metadata=_help("What a row does whose images alone are longer than max_length.")
    )
    allow_outside_paths: bool = field(
        default=False, metadata=_help("Accept image paths that leave the data folder and image_root.")
    )
    allow_remote_images: bool = field(default=False, metadata=_help("Fetch images that are given as URLs."))
    cache_dir: str | None = field(
        default=None,
        metadata=_help(
            "Folder or URI for prepared rows, which later runs use again. By default in storage_path or ~/.cache."
        ),
    )
    cache_size_gb: float = field(
        default=200.0,
        metadata=_help(
            "Delete the prepared rows that were not used for longest when cache_dir holds more than this."
        ),
    )
    no_cache: bool = field(
        default=False,
        metadata=_help(
            "Keep no pixels on disk: read and resize the raw images at every use, in the same order."
        ),
    )
    num_workers: str = field(
        default="1",
        metadata=_help(
            "Training workers, one GPU each: N, or MIN:MAX for an elastic run. 0 trains in this process."
        ),
    )
    storage_path: str | None = field(
        default=None,
        metadata=_help("Folder or URI that every node can reach, for checkpoints and the search's state."),
    )
    overwrite: bool = field(
        default=False, metadata=_help("Replace what output_dir holds from an earlier run.")
    )
    resume: str | None = field(
        default=None, metadata=_help("Output folder of an interrupted run or search to go on with.")
    )

    @property
    def workers(self) -> int | tuple[int, int]:
        """Number of training workers, or the (smallest, largest) number of an elastic run."""
        low, colon, high = self.num_workers.partition(":")
        return (int(low), int(high)) if colon else int(low)

    @property
    def most_workers(self) -> int:
        """The largest number of training workers."""
        return int(self.num_workers.rpartition(":")[2])


@dataclass
class ModelArguments(ModelConfig):
    """The frozen base model and the LoRA adapter on it."""

    _argument_group_name: ClassVar[str] = "model and LoRA"

    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default=None,
        metadata=_help(
            "Type that the base computes in. By default bfloat16 where the device has it, else float32.",
            "auto",
            "bfloat16",
            "float16",
            "float32",
        ),
    )
    use_peft: bool = field(default=True, metadata=_help(""))
    lora_target_modules: list[str] | str | None = field(  # type: ignore[assignment]  # TRL's own checks make it a text too
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata=_help(
            "Modules that get an adapter. Bare names mean those of the language model; a pattern is matched against full module names."
        ),
    )
    lora_vision: bool = field(
        default=False, metadata=_help("Let bare names in lora_target_modules also match the vision tower.")
    )
    quantization: Quantization | None = field(
        default=None,
        metadata=_help(
            "How the base's weights are stored. load_in_4bit means nf4, load_in_8bit means int8; fp8 also multiplies in 8 bits, on GPUs "
            "that can."
        ),
    )
    base_in_memory: Literal["auto", "quantized", "dequantized"] = field(
        default="auto",
        metadata=_help(
            "With nf4 or int8: keep the weights quantized, or hold their values once in the type that the base computes in: faster, "
            "two bytes a weight. By default dequantized where the GPU has room."
        ),
    )
    llm_int8: bool = field(
        default=False,
        metadata=_help(
            "With int8: also quantise activations, as LLM.int8 does. A row's result then depends on its neighbours."
        ),
    )
    use_bnb_nested_quant: bool = field(
        default=True, metadata=_help("With nf4: quantise the scales too, which saves 0.4 bits a weight.")
    )

    def __post_init__(self) -> None:
        # Not ModelConfig's: it turns a list of one name into a string, which PEFT takes for a pattern.
        pass

    @property
    def base_model(self) -> str:
        """The base's folder or name on the Hub. Parsed settings always have one."""
        if self.model_name_or_path is None:
            raise ConfigError("model_name_or_path is missing")
        return self.model_name_or_path

    @property
    def base_quantization(self) -> Quantization:
        """How the base is quantised, from `quantization`, `load_in_4bit` or `load_in_8bit`, whichever is
        set."""
        if self.quantization is not None:
            return self.quantization
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"


# Those that follow from the step alone: a schedule that looks at a metric could not be told apart from early
# stopping.
_SCHEDULES = tuple(
    kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")
)
# Those that train adapters with nothing more installed.
_OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"),
    *(
        "adamw_8bit",
        "adamw_bnb_8bit",
        "ademamix",
        "ademamix_8bit",
        "lion_32bit",
        "lion_8bit",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
    ),
    *(
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
    ),
)


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's training arguments with the defaults that fit adapters.

    Only its fields are read here. Making one asks the machine for a GPU, so that is left to the worker that
    trains.
    """

    _argument_group_name: ClassVar[str] = "training"

    output_dir: str = field(default="output", metadata=_help("Folder that the results are written to."))
    remove_unused_columns: bool = field(default=False, metadata=_help(""))
    lr_scheduler_type: SchedulerType | str = field(
        default="linear",
        metadata=_help(
            "How the learning rate changes over the run; lr_scheduler_kwargs sets its details.", *_SCHEDULES
        ),
    )
    optim: OptimizerNames | str = field(
        default="adamw_torch_fused", metadata=_help("Optimizer of the adapter's weights.", *_OPTIMIZERS)
    )
    report_to: Literal["none", "tensorboard"] = field(
        default="none",
        metadata=_help("Curves go to runs/, for TensorBoard, whichever is given; no other service is told."),
    )
    eval_strategy: IntervalStrategy | str = field(
        default="steps",
        metadata=_help("When to evaluate, report and save: every eval_steps, after every epoch, or never."),
    )
    eval_steps: float | None = field(
        default=0.25,
        metadata=_help(
            "Steps between evaluations, or below 1 a share of the run: 0.25 gives a search four chances to stop a trial."
        ),
    )
    save_strategy: SaveStrategy | str = field(default="no", metadata=_help(""))
    logging_steps: float = field(
        default=1, metadata=_help("Steps between two logged training losses, or below 1 a share of the run.")
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata=_help(
            "Log the mean of the other losses in place of one that is not finite, and wait for it in every step."
        ),
    )
    loss_type: str = field(
        default="nll",
        metadata=_help(
            "Training loss: nll, or dft for Dynamic Fine-Tuning. Evaluation is always nll.", "nll", "dft"
        ),
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # None: vlmtune decides
        default=None,
        metadata=_help(
            "Compute activations again instead of keeping them, a third slower; auto: only where they do not fit in memory."
        ),
    )
    torch_compile: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata=_help(
            "Compile the decoder's layers: half a minute at the start; auto: on a GPU, in long runs."
        ),
    )
    cuda_graphs: bool | None = field(
        default=None,
        metadata=_help(
            "Replay recorded steps, faster below a few thousand tokens; auto: on a GPU with room for them."
        ),
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata=_help(
            "Rows of per_device_train_batch_size that go through the model at once. By default as many as fit in memory."
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata=_help("Pad every batch to a length that is a multiple of this many tokens.")
    )
    max_length: int | None = field(
        default=1024,
        metadata=_help(
            "Longest row in tokens, its images included. Text is shortened to it, images never; none for no limit."
        ),
    )


@dataclass
class SearchArguments:
    """What is searched, with how many trials, and which trial is the best."""

    _argument_group_name: ClassVar[str] = "search"

    search_space: dict[str, Any] | None = field(
        default=None,
        metadata=_help(
            "What to search, by flag name; usually in the YAML file. On the command line, as JSON."
        ),
    )
    num_samples: int = field(
        default=16, metadata=_help("Trials to run. A space that is all grid runs every combination instead.")
    )
    max_concurrent_trials: int | None = field(
        default=None, metadata=_help("Trials that run at once. By default, as many as the resources allow.")
    )
    trial_runner: Literal["auto", "isolated", "packed"] = field(
        default="auto",
        metadata=_help(
            "How a trial runs: packed trains many over one frozen base on each GPU, isolated gives each its own training workers. "
            "By default packed, where every option of the search allows it."
        ),
    )
    metric: str = field(
        default="eval_loss",
        metadata=_help(
            "What the search optimises: eval_loss, a metric of generated answers such as exact_match or mae, or another number that trials "
            "report."
        ),
    )
    more_metrics: list[str] | None = field(
        default=None,
        metadata=_help(
            "Further numbers that trials report, such as seconds or peak_memory, to be good in at the same time: the search looks for the "
            "trade-offs between them and the metric, which decides early stopping and the best trial."
        ),
    )
    metric_rows: int = field(
        default=64,
        metadata=_help(
            "With a metric of answers: evaluation rows that are answered at each evaluation; all of them at a trial's end."
        ),
    )
    max_new_tokens: int = field(
        default=32, metadata=_help("With a metric of answers: the longest answer, in tokens.")
    )
    mode: Literal["min", "max"] = field(
        default="min", metadata=_help("Whether a smaller or a larger metric is better.")
    )
    time_budget_s: float | None = field(
        default=None, metadata=_help("Seconds after which no more trials run.")
    )
    refit: bool = field(
        default=False,
        metadata=_help(
            "After the search, train the best values once more, alone and on the full training data."
        ),
    )
    report: bool = field(
        default=True,
        metadata=_help(
            "After the search, answer the test rows with the base and the adapters, and write report.html."
        ),
    )
    early_stopping: Literal["asha", "none"] = field(
        default="asha", metadata=_help("Stop trials that fall behind at an evaluation, or never.")
    )
    grace_period: float = field(
        default=0.5,
        metadata=_help(
            "Share of its run that every trial gets before early stopping may end it; the first rung of ASHA."
        ),
    )
    reduction_factor: int = field(
        default=3,
        metadata=_help(
            "One in this many trials goes on at each rung of early stopping; each is this many times later."
        ),
    )


GROUPS: tuple[Any, ...] = (DataArguments, ModelArguments, TrainingArguments, SearchArguments)


def plain_default(option: dataclasses.Field[Any]) -> Any:
    """A field's default as a plain value; lists are fresh each time."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default
