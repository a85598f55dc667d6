"""The groups of options: frozen dataclasses of plain values, which pickle, compare and need no GPU.

A field's metadata holds its `--help` text, its choices, and its flag where that is not the field's name.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmtune.config.kinds import Kind
from vlmtune.config.trl_flags import TrlTraining
from vlmtune.errors import ConfigError
from vlmtune.image_resolution import ImageResolution
from vlmtune.model_ref import ModelRef

Quantization = Literal["none", "nf4", "int8", "fp8"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# Schedules that depend on the step alone. One that reacts to a metric would stop trials in a way of its own.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
# Optimizers that train adapters with nothing more installed.
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit"),
    *("paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
    kind: Kind | None = None,
) -> Any:
    """A dataclass field that is an option of the command line.

    Args:
        kind: of its values, where that does not follow from the field's type.
    """
    metadata: dict[str, Any] = {"help": text}
    metadata |= {"choices": choices} if choices else {}
    metadata |= {"flag": flag} if flag else {}
    metadata |= {"kind": kind} if kind else {}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from, and how they are checked, split and cached."""

    data_path: str | list[str] | None = option(
        None,
        "Training data: a frames folder, CSV, JSON, JSONL or Parquet, images with metadata.csv or in a "
        "folder for each class, a saved dataset, a dataset's name on the Hub, and more: see docs/data.md. "
        "Several are joined.",
        kind="paths",
    )
    data_weights: list[float] | None = option(
        None,
        "With several data_path: the share of each in every epoch, as in 0.7 0.3. By default all rows of "
        "each.",
        kind="numbers",
    )
    eval_data_path: str | None = option(None, "Evaluation data, if it is not to be split off from data_path.")
    eval_fraction: float = option(
        0.1, "Share of data_path that is evaluated on during training and search, split by image content."
    )
    test_fraction: float = option(
        0.1, "Share of data_path that no search sees; the headline numbers come from it."
    )
    split_seed: int = option(
        42, "Seed of the split into train, eval and test; seed is that of training and search alone."
    )
    group_by: str | None = option(
        None, "Column whose rows stay together in the split, such as a camera or a sequence."
    )
    columns: dict[str, str] | None = option(
        None,
        "Which column is read as which field, as in image=photo question=q answer=count.",
        kind="pairs",
    )
    question: str | None = option(
        None, "Asked about every row, where the data holds answers or labels and no question."
    )
    answer_column: str | None = option(
        None, "Column with the answer to --question. By default answer, or label."
    )
    image_root: str | None = option(
        None, "Folder that image paths are relative to. By default, the folder of the file that names them."
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error",
        "What to do with a row that cannot be used: stop the run, or skip it and list it in bad_rows.jsonl.",
    )
    max_bad_fraction: float = option(
        0.05, "With on_bad_row skip: the largest share of the rows that may be skipped; more is an error."
    )
    group_near_duplicates: Literal["auto", "yes", "no"] = option(
        "auto",
        "Whether rows whose images look nearly alike (encoded again, neighbouring frames) stay together in "
        "the split. By default, where each split keeps its number of rows.",
    )
    given_splits: Literal["use", "merge"] = option(
        "use",
        "Whether files, fields and Hub splits named train, val and test are these splits, or one set of rows "
        "to split anew.",
    )
    box_format: Literal[
        "auto", "absolute", "absolute_resized", "norm1000", "norm1", "qwen2_vl", "internvl"
    ] = option(
        "auto",
        "How boxes and points are written in a text: pixels of the original or the resized image, or 0 to "
        "1000, or 0 to 1. By default as the model's family was taught, where that is known.",
    )
    video_frames: int | None = option(
        None,
        "Frames to read of each video, at even distances, through the processor's own way for videos. "
        "By default no video is read.",
    )
    on_long_row: Literal["error", "skip"] = option(
        "error", "What to do with a row whose images alone are longer than max_length: stop, or leave it out."
    )
    allow_outside_paths: bool = option(False, "Accept image paths that leave the data folder and image_root.")
    allow_remote_images: bool = option(False, "Fetch images that are given as URLs.")
    cache_dir: str | None = option(
        None,
        "Folder or URI for prepared rows, which later runs use again. By default in storage_path or "
        "~/.cache.",
    )
    cache_size_gb: float = option(
        200.0, "Delete the least recently used prepared rows when cache_dir holds more than this."
    )
    no_cache: bool = option(
        False, "Keep no pixels on disk: read and resize the raw images at every use, in the same order."
    )

    @property
    def paths(self) -> list[str]:
        """Every `data_path`; none without data."""
        return [self.data_path] if isinstance(self.data_path, str) else list(self.data_path or [])

    @property
    def shown_path(self) -> str:
        """The data as people are told of it."""
        return ", ".join(self.paths)


@dataclass(frozen=True)
class RunSettings:
    """Where a run computes and writes."""

    output_dir: str = option("output", "Folder that the results are written to.")
    num_workers: str = option(
        "1", "Training workers, one GPU each: N, or MIN:MAX for an elastic run. 0 trains in this process."
    )
    gpus: int | None = option(
        None, "Use at most this many GPUs of a cluster that others use too. By default all that are free."
    )
    storage_path: str | None = option(
        None, "Folder or URI that every node can reach, for checkpoints and the search's state."
    )
    overwrite: bool = option(False, "Replace what output_dir holds from an earlier run.")
    resume: str | None = option(
        None,
        "Output folder of an interrupted run or search to resume. With a larger num_samples it extends a "
        "search, a finished one too.",
    )
    salvage: bool = option(
        False,
        "With resume, of a search that is damaged: only copy its best finished adapter and the table of its "
        "trials to salvaged/ in that folder.",
    )
    trust_folder: bool = option(
        False, "Read the folders of resume and warm_start although another user owns them."
    )
    use_cpu: bool = option(False, "Compute on the CPU even where there is a GPU.")

    @property
    def workers(self) -> int | tuple[int, int]:
        """Number of training workers, or the (smallest, largest) number of an elastic run."""
        low, colon, high = self.num_workers.partition(":")
        return (int(low), int(high)) if colon else int(low)

    @property
    def min_workers(self) -> int:
        """The smallest number of training workers, which must fit for a run to start."""
        return int(self.num_workers.partition(":")[0])

    @property
    def max_workers(self) -> int:
        """The largest number of training workers."""
        return int(self.num_workers.rpartition(":")[2])


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model: which one, in which types, how its weights are held, and how it gets images."""

    model_name_or_path: str | None = option(None, "Base model: a folder, or a name on the Hub.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = option(False, "Run the Python code that the model's repository brings along.")
    dtype: Dtype | None = option(
        None, "Type that the base computes in. By default bfloat16 where the device has it, else float32."
    )
    attn_implementation: str | None = option(
        None,
        "Attention kernel, by transformers' name: sdpa, eager, flash_attention_2. By default, the model's.",
    )
    quantization: Quantization | None = option(
        None,
        "How the base's weights are stored. load_in_4bit means nf4, load_in_8bit means int8; fp8 also "
        "multiplies in 8 bits, on GPUs that can.",
    )
    load_in_8bit: bool = option(False, "The same as quantization int8.")
    load_in_4bit: bool = option(False, "The same as quantization nf4.")
    use_bnb_nested_quant: bool = option(
        True, "With nf4: quantize the scales too, which saves 0.4 bits a weight."
    )
    base_in_memory: Literal["auto", "quantized", "dequantized"] = option(
        "auto",
        "With nf4 or int8: keep the weights quantized, or dequantize them once, at load, to the type "
        "that the base computes in: faster, two bytes a weight. By default dequantized where there is "
        "room.",
    )
    llm_int8: bool = option(
        False,
        "With int8: also quantize activations, as LLM.int8 does. A row's result then depends on its "
        "neighbours.",
    )
    max_pixels: int | None = option(
        None,
        "Most pixels of a resized image, where the model's processor limits them (Qwen-VL, GLM-V): fewer "
        "pixels are fewer image tokens. By default the processor's own. It can be searched.",
    )
    min_pixels: int | None = option(
        None, "Fewest pixels of a resized image: smaller images are enlarged. By default the processor's own."
    )
    max_image_tiles: int | None = option(
        None,
        "Most tiles that an image is cut into, where the model's processor cuts it (InternVL, Llama 4). By "
        "default the processor's own. It can be searched.",
    )

    @property
    def base_model(self) -> str:
        """The base's folder or name on the Hub. Parsed settings always have one."""
        if self.model_name_or_path is None:
            raise ConfigError("model_name_or_path is missing")
        return self.model_name_or_path

    @property
    def ref(self) -> ModelRef:
        """The base model's name, revision, whether its own code may run, and the resolution of images."""
        return ModelRef(self.base_model, self.model_revision, self.trust_remote_code, self.resolution)

    @property
    def resolution(self) -> ImageResolution:
        """The limits of the images' resolution that replace those of the model's processor."""
        return ImageResolution(self.max_pixels, self.min_pixels, self.max_image_tiles)

    @property
    def base_quantization(self) -> Quantization:
        """The base's quantization: `quantization`, or what `load_in_4bit` or `load_in_8bit` means."""
        if self.quantization is not None:
            return self.quantization
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA adapter. A field's flag is PEFT's name with `lora_` before it."""

    r: int = option(16, "Rank of the adapter.", flag="lora_r")
    alpha: int = option(
        32, "Scaling of the adapter: its output is multiplied by alpha / r.", flag="lora_alpha"
    )
    dropout: float = option(0.05, "Dropout of the adapter's input.", flag="lora_dropout")
    target_modules: list[str] | str | None = option(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Modules that get an adapter. Bare names mean those of the language model; a pattern is matched "
        "against full module names.",
        flag="lora_target_modules",
    )
    modules_to_save: list[str] | None = option(
        None, "Modules that are trained whole and saved with the adapter.", flag="lora_modules_to_save"
    )
    vision: bool = option(
        False, "Let bare names in lora_target_modules also match the vision tower.", flag="lora_vision"
    )
    vision_learning_rate: float | None = option(
        None,
        "Learning rate of what is trained beside the language model: the vision tower's and projector's "
        "adapters, and modules that are trained whole. By default learning_rate.",
    )
    use_rslora: bool = option(False, "Rank-stabilised LoRA: multiply by alpha / sqrt(r).")
    use_dora: bool = option(False, "Weight-decomposed LoRA (DoRA).")


@dataclass(frozen=True)
class TrainingSettings(TrlTraining):
    """TRL's training options by their own names, with defaults that fit adapters, and a few of vlmtune's."""

    lr_scheduler_type: str = option(
        "linear",
        "How the learning rate changes over the run; lr_scheduler_kwargs sets its details.",
        choices=SCHEDULES,
    )
    optim: str = option("adamw_torch_fused", "Optimizer of the adapter's weights.", choices=OPTIMIZERS)
    report_to: list[str] | None = option(
        ["none"],
        "Services that get the curves of each trial too, as a run of its own: wandb, mlflow, trackio. "
        "TensorBoard's are always in runs/.",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
    )
    eval_strategy: str = option(
        "steps",
        "When to evaluate, report and save: every eval_steps, after every epoch, or never.",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float | None = option(
        0.25,
        "Steps between evaluations, or below 1 a share of the run: 0.25 gives a search four chances to "
        "stop a trial.",
    )
    load_best_model_at_end: bool | None = option(
        None,
        "Keep the adapter of the best evaluation, not of the last one; auto: in a search, whose trials are "
        "then compared by their best evaluation.",
    )
    early_stopping_patience: int | None = option(
        None, "End a run after so many evaluations in a row without a gain. By default, never."
    )
    early_stopping_threshold: float = option(
        0.0, "With early_stopping_patience: a smaller gain of the metric than this is none."
    )
    logging_steps: float = option(
        1.0, "Steps between two logged training losses, or below 1 a share of the run."
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Replace a loss that is NaN or infinite in the log by the mean of the others; each step waits for"
        " it.",
    )
    loss_type: str = option(
        "nll",
        "Training loss: nll, or dft for Dynamic Fine-Tuning. Evaluation is always nll.",
        choices=("nll", "dft"),
    )
    gradient_checkpointing: bool | None = option(  # type: ignore[assignment]  # None: vlmtune decides
        None,
        "Recompute activations instead of keeping them, a third slower; auto: only where they do not fit "
        "in memory.",
    )
    torch_compile: bool | None = option(  # type: ignore[assignment]
        None, "Compile the decoder's layers: half a minute at the start; auto: on a GPU, in long runs."
    )
    cuda_graphs: bool | None = option(
        None,
        "Replay captured steps, faster below a few thousand tokens; auto: on a GPU with room for them.",
    )
    self_check: bool = option(
        True,
        "Before a model's first step, compare it with the plain transformers model on two rows, and leave out"
        " what makes it differ; once for each model and version of the libraries.",
    )
    micro_batch_size: int | None = option(
        None,
        "Run a batch of per_device_train_batch_size rows in parts of this many, to save memory; its gradient "
        "is the same. By default as many rows as fit in memory.",
    )
    pad_to_multiple_of: int | None = option(  # type: ignore[assignment]  # TRL's "auto" is for other hardware
        None, "Pad every batch to a length that is a multiple of this many tokens."
    )
    train_sampling_strategy: str = option(
        "random",
        "Order of the training rows: random, or group_by_length, whose steps have rows of similar length and "
        "so less padding.",
        choices=("random", "group_by_length"),
    )
    max_length: int | None = option(
        1024,
        "Longest row in tokens, its images included. Text is shortened to it, images never; none for no "
        "limit.",
    )


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, with how many trials, and which trial is the best."""

    search_space: dict[str, Any] | None = option(
        None, "What to search, by flag name; usually in the YAML file. On the command line, as JSON."
    )
    recipe: dict[str, Any] | None = option(
        {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"},
        "Values that people use without a search, by flag name. They are the second trial, or where the "
        "search space does not have them one run more, so that the search is compared with them too; none: "
        "no such run.",
    )
    warm_start: list[str] | None = option(
        None,
        "Output folders of earlier searches. Trials of the same problem count as observations; of others the "
        "best values are tried first, with a tenth of the trials.",
    )
    num_samples: int = option(16, "Trials to run. A space that is all grid runs every combination instead.")
    max_concurrent_trials: int | None = option(
        None, "Trials that run at once. By default, as many as the resources allow."
    )
    trial_runner: Literal["auto", "isolated", "packed"] = option(
        "auto",
        "How a trial runs: packed trains many over one frozen base on each GPU, isolated gives each its "
        "own training workers. By default packed, where every option of the search allows it.",
    )
    metric: str = option(
        "eval_loss",
        "What the search optimises: eval_loss, a metric of generated answers such as exact_match or mae, "
        "or another number that trials report.",
    )
    more_metrics: list[str] | None = option(
        None,
        "Further objectives beside --metric, such as seconds or peak_memory. The search then looks for the "
        "Pareto front: trials that no other trial beats in every objective. --metric alone decides early "
        "stopping and the best trial.",
    )
    metric_rows: int = option(
        64,
        "With a metric of answers: evaluation rows that are answered at each evaluation; all of them at a"
        " trial's end.",
    )
    max_new_tokens: int = option(32, "With a metric of answers: the longest answer, in tokens.")
    mode: Literal["min", "max"] = option("min", "Whether a smaller or a larger metric is better.")
    time_budget_s: float | None = option(None, "Seconds after which no more trials run.")
    confirm: str | None = option(
        "3x2",
        "After a search of at least 12 trials, train so many of the best again with so many other seeds, and "
        "choose the winner by the mean; none: choose by the search's own seed.",
    )
    refit: bool = option(
        False, "After the search, train the best values once more, alone and on the full training data."
    )
    report: bool = option(
        True, "After the search, answer the test rows with the base and the adapters, and write report.html."
    )
    early_stopping: Literal["asha", "none"] = option(
        "asha", "Stop trials that fall behind at an evaluation, or never."
    )
    grace_period: float = option(
        0.5,
        "Share of its run that every trial gets before early stopping may end it; the first rung of ASHA.",
    )
    reduction_factor: int = option(
        3,
        "One in this many trials continues at each rung of early stopping; each rung comes at this many "
        "times the steps of the one before.",
    )

    @property
    def unmeasured(self) -> dict[str, float]:
        """NaN for every objective, as a trial reports those that it did not measure.

        Ray Tune ends a search whose searcher misses an objective in a report.
        """
        return dict.fromkeys((self.metric, *(self.more_metrics or ())), math.nan)
