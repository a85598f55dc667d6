"""The options of data, run, base model and adapter, each group a frozen dataclass of plain values.

A field's metadata holds its `--help` text, its choices, and its flag name if that is not the field's name.
The groups of training and search are in `training_options` and `search_options`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from vlmtune.config.kinds import Kind
from vlmtune.errors import ConfigError
from vlmtune.image_resolution import ImageResolution
from vlmtune.model_ref import ModelRef

Quantization = Literal["none", "nf4", "int8", "fp8"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


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
        text: its description in `--help`.
        choices: the allowed values, if the field's type does not say them.
        flag: the flag's name, if it is not the field's name.
        kind: the kind of its values, if it does not follow from the field's type.
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
        "each are used.",
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
        None, "The question to ask about every row, if the data has answers or labels but no question."
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
        "Whether rows whose images look nearly alike (encoded again, neighboring frames) stay together in "
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
        """Every `data_path`, as a list; empty if no data is given."""
        return [self.data_path] if isinstance(self.data_path, str) else list(self.data_path or [])

    @property
    def shown_path(self) -> str:
        """The data paths in one text, for messages."""
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
        "neighbors.",
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
