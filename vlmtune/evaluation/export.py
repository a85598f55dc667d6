"""Export an adapter: merged into its base and checked, or as one file; and how vLLM serves it."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune import output, storage
from vlmtune.cluster import in_ray_job
from vlmtune.config.options import Quantization
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.examples import load_images
from vlmtune.data.find_input_format import find_input_format, gradient_image
from vlmtune.data.formats import read_fragment
from vlmtune.data.images import ImageError
from vlmtune.data.source import DataSource
from vlmtune.data.template_source import template_of
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.evaluation.adapter import adapter_settings, check_adapter_fits
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.evaluation.options import STATE_DICT_FILE, ExportOptions
from vlmtune.evaluation.quantized_merge import QuantizedLoss, measure_losses, write_quantized
from vlmtune.model.base import load_base
from vlmtune.model.lora import load_adapter
from vlmtune.model.lora_targets import language_prefix
from vlmtune.model.serving import DEFAULT_RANK, WITHOUT_LORA, max_lora_rank, refusals
from vlmtune.model_ref import ModelRef
from vlmtune.session import with_absolute_paths

logger = logging.getLogger(__name__)

# Allowed difference of the logits, relative to their spread. It covers the rounding of merged weights to the
# dtype in which they are stored.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class MergeCheck:
    """How close the logits of two models are on one prompt.

    Attributes:
        difference: root mean square of the difference, divided by the spread of the logits.
        tolerance: largest allowed difference.
        equal: number of positions at which the likeliest token is the same.
        tokens: number of positions.
    """

    difference: float
    tolerance: float
    equal: int
    tokens: int

    def text(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} of their spread (tolerance {self.tolerance:g}); "
            f"the likeliest token is the same at {self.equal} of {self.tokens} places"
        )


@dataclass(frozen=True)
class ExportResult:
    """What `vlmtune.export` wrote.

    Attributes:
        folder: absolute path of the output folder. With `merge`, plain transformers loads the model from it.
        merge_check: the merged model compared with base and adapter; None without `merge`.
        state_dict_file: the adapter's tensors for `torch.load`; None without `state_dict`.
        vllm_command: the command with which vLLM serves the adapter; None if vLLM does not take it.
        vllm_refusals: why vLLM does not take the adapter, if so.
        merged_command: the command with which vLLM serves the merged model; None without `merge`, or if vLLM
            does not take models of this type.
        quantized_loss: how much the loss grows when the merged model is stored in 4 or 8 bits; None in full
            precision, or if the adapter's data is no longer there.
    """

    folder: str
    merge_check: MergeCheck | None
    state_dict_file: str | None
    vllm_command: str | None
    vllm_refusals: tuple[str, ...]
    merged_command: str | None = None
    quantized_loss: QuantizedLoss | None = None


def export_adapter(options: ExportOptions) -> ExportResult:
    """Write the merged model, the adapter's state dict, or both.

    Raises:
        UserError: something is wrong with the adapter or its base. Nothing has been written then.
        RuntimeError: the merged model's results differ from those of base and adapter; it is deleted.
    """
    overrides: dict[str, Any] = {**options.overrides, "output_dir": options.output_dir}
    # The quantization of the result. The merge itself is in full precision.
    quantization: Quantization = overrides.pop("quantization", "none")
    settings = with_absolute_paths(adapter_settings(options.adapter, overrides))
    folder = output.resolve_folder(settings.run.output_dir, in_job=in_ray_job())
    if "://" in folder:
        raise ConfigError(f"--output_dir {folder}: give a local folder, and copy it from there")
    output.check_free(folder, overwrite=settings.run.overwrite, kind=output.EXPORT)
    if options.merge:
        check_full_precision(settings.model.ref)
    check_adapter_fits(settings, options.adapter)
    output.claim(folder, overwrite=settings.run.overwrite, kind=output.EXPORT)
    merge_check = loss = None
    if options.merge and quantization == "none":
        merge_check = merge(settings, options.adapter, folder)
    elif options.merge:
        merge_check, loss = merge_quantized(settings, options.adapter, folder, quantization)
    state_dict_file = write_state_dict(options.adapter, folder) if options.state_dict else None
    record = {"adapter": options.adapter, "base_model": settings.model.base_model, "merged": options.merge}
    record["quantization"] = quantization
    storage.write_text(f"{folder}/export.yaml", output.dump_redacted(record))
    merged_command = None
    if options.merge and settings.model.ref.config().model_type not in WITHOUT_LORA:
        merged_command = f"vllm serve {folder}"
    serving = vllm_serving(settings, options.adapter)
    return ExportResult(folder, merge_check, state_dict_file, *serving, merged_command, loss)


def merge_quantized(
    settings: Settings, adapter: str, folder: str, quantization: Quantization
) -> tuple[MergeCheck, QuantizedLoss | None]:
    """Merge in full precision, check the result, store it in `quantization`, and measure the loss of that.

    The full-precision model needs space on the disk for the time being.

    Raises:
        RuntimeError: see `merge`.
    """
    full = f"{folder}/full-precision.part"
    Path(full).mkdir()
    try:
        check = merge(settings, adapter, full)
        write_quantized(settings, full, folder, quantization, _device(settings))
    except BaseException:
        for path in Path(folder).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return check, measure_losses(settings, adapter, folder, quantization, _device(settings))


def check_full_precision(base: ModelRef) -> None:
    """Raises ModelError for a base whose weights are stored quantized."""
    config: Any = base.config()
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{base.name} is stored quantized, and an adapter is merged into full-precision weights only: "
            "give the model that it was made from with --model_name_or_path"
        )


def merge(settings: Settings, adapter: str, folder: str) -> MergeCheck:
    """Merge the adapter into the full-precision base, write it with its processor, load it and compare.

    The base is loaded in the dtype in which it is stored, or in `--dtype`; on the GPU if there is one. The
    model is in memory once.

    Raises:
        RuntimeError: the logits differ by more than the tolerance.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = _device(settings)
    base_ref = settings.model.ref
    processor: Any = base_ref.processor()
    example, builder = _check_prompt(settings, processor)
    base = _load_full_precision(settings, base_ref, device)
    adapted: Any = load_adapter(base, adapter)
    expected = _logits(adapted, builder, example)
    merged = adapted.merge_and_unload(safe_merge=True)  # raises if a merged weight is NaN or infinite
    dtype = str(merged.dtype).removeprefix("torch.")
    merged.config.use_cache = merged.config.get_text_config().use_cache = True  # training switches it off
    merged.save_pretrained(folder)
    if processor.chat_template is None and processor.tokenizer.chat_template is None:
        processor.chat_template = template_of(processor)  # so that others render prompts as training did
    processor.save_pretrained(folder)
    storage.apply_umask(folder)
    del base, adapted, merged
    merged_ref = ModelRef(folder, trust_remote_code=base_ref.trust_remote_code)
    logits = _logits(_load_full_precision(settings, merged_ref, device), builder, example)
    check = compare_logits(logits, expected, TOLERANCES[dtype])
    if not check.difference <= check.tolerance:
        for path in Path(folder).iterdir():
            path.unlink()
        raise RuntimeError(
            f"the merged model does not compute what base and adapter do, and was deleted: {check.text()}"
        )
    return check


def _device(settings: Settings) -> Any:
    import torch

    on_gpu = torch.cuda.is_available() and not settings.run.use_cpu
    return torch.device("cuda" if on_gpu else "cpu")


def _load_full_precision(settings: Settings, ref: ModelRef, device: Any) -> Any:
    return load_base(
        ref,
        quantization="none",
        dtype=settings.model.dtype or "auto",
        device=device,
        attn_implementation=settings.model.attn_implementation,
    ).eval()


def _logits(model: Any, builder: BatchBuilder, example: EncodedExample) -> Any:
    """The logits of one example; shape `[T, V]`, float32 on the CPU."""
    import torch

    batch = builder.batch(model, [example])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[0].float().cpu()


def compare_logits(logits: Any, expected: Any, tolerance: float) -> MergeCheck:
    """Compare two models' logits, float32 `[T, V]`."""
    difference = float((logits - expected).square().mean().sqrt() / expected.std())
    equal = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    return MergeCheck(difference, tolerance, equal, len(expected))


def _check_prompt(settings: Settings, processor: Any) -> tuple[EncodedExample, BatchBuilder]:
    """The first row of the adapter's data that can be read, else a question about a generated image."""
    input_format = find_input_format(processor)
    encoder = RowEncoder(processor, input_format)
    tokenizer = processor.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    builder = BatchBuilder(input_format, pad)
    for row in _good_rows(settings):
        try:
            return encoder.encode(row["messages"], load_images(row["images"], row["hints"])), builder
        except (ImageError, EncodeError):
            continue
    question = [{"type": "image"}, {"type": "text", "text": "How many people are in this image?"}]
    answer = [{"type": "text", "text": "There are 3 people."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return encoder.encode(messages, [gradient_image(320, 240)]), builder


def _good_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """The good rows of the adapter's data; none if the data is no longer there."""
    if settings.data.data_path is None:
        return
    try:
        for fragment in DataSource.from_settings(settings).scan().training:
            yield from (row for row in read_fragment(fragment) if row["error"] is None)
    except DataError as error:
        logger.info(console_line("", f"the check uses a generated image: {error}"))


def write_state_dict(adapter: str, folder: str) -> str:
    """Write the adapter's tensors, by their PEFT names, for `torch.load`. Returns the path."""
    import torch

    path = f"{folder}/{STATE_DICT_FILE}"
    torch.save(_adapter_tensors(adapter), path)
    return path


def _adapter_tensors(adapter: str) -> dict[str, Any]:
    from peft.utils.save_and_load import load_peft_weights

    return dict(load_peft_weights(adapter, device="cpu"))


def vllm_serving(settings: Settings, adapter: str) -> tuple[str | None, tuple[str, ...]]:
    """The command with which vLLM serves the adapter, or None and the reasons why vLLM does not take it."""
    meta_model = settings.model.ref.meta_model()
    adapter_config = json.loads((Path(adapter) / "adapter_config.json").read_bytes())
    reasons = refusals(
        adapter_config,
        [*_adapter_tensors(adapter)],
        model_type=meta_model.config.model_type,
        language_prefix=language_prefix(meta_model),
    )
    if reasons:
        return None, tuple(reasons)
    rank = max_lora_rank(adapter_config["r"])
    option = "" if rank is None or rank <= DEFAULT_RANK else f" --max-lora-rank {rank}"
    modules = f"--lora-modules tuned={Path(adapter).absolute()}"
    return f"vllm serve {settings.model.base_model} --enable-lora{option} {modules}", ()
