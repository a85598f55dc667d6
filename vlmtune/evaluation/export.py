"""What `ray_jobs/export.py` calls: a merged model, checked against base and adapter; the adapter as one
file; what vLLM takes of it."""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune import output, storage
from vlmtune.cluster import in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.collate import gradient_image, probe_pixel_format
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.formats import read_piece
from vlmtune.data.images import ImageError, load_image
from vlmtune.data.scan import scan
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.evaluation.adapter import adapter_settings, check_fit
from vlmtune.evaluation.generate import Layout
from vlmtune.evaluation.options import BASE, read
from vlmtune.model.base import load_base
from vlmtune.model.lora import language_prefix, load_adapter
from vlmtune.model.serving import DEFAULT_RANK, max_lora_rank, refusals
from vlmtune.model_ref import ModelRef

logger = logging.getLogger(__name__)

STATE_DICT = "lora_adapter_state_dict.pt"
# Of the logits' difference, relative to their spread: what rounding the merged weights once to the type that
# they are stored in may do.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Agreement:
    """How near two models' logits are: root mean square of the difference over the spread of the logits, and
    equal next tokens of all."""

    difference: float
    tolerance: float
    equal: int
    tokens: int

    def text(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} of their spread (tolerance {self.tolerance:g}); "
            f"the likeliest token is the same at {self.equal} of {self.tokens} places"
        )


def export(argv: Sequence[str], description: str) -> list[str]:
    """Run the command line; returns what to print.

    Raises:
        UserError: for whatever is wrong with the options, the adapter or its base, before anything is
        written.
        RuntimeError: the merged model does not compute what base and adapter do; it is not left behind.
    """
    options, given = read(argv, description, (*BASE, "output_dir", "overwrite"), _add_options)
    if not (options.merge or options.state_dict):
        raise ConfigError("nothing to export: give --merge, --state_dict, or both")
    quantization = given.pop("quantization", "none")
    if quantization != "none":
        raise ConfigError(
            f"--quantization {quantization}: an adapter is merged into full-precision weights only; leave it out"
        )
    settings = output.located(adapter_settings(options.adapter, given))
    folder = output.place(settings.run.output_dir, in_job=in_ray_job())
    if "://" in folder:
        raise ConfigError(f"--output_dir {folder}: give a local folder, and copy it from there")
    output.check_free(folder, overwrite=settings.run.overwrite, kind=output.EXPORT)
    if options.merge:
        check_full_precision(settings)
    check_fit(settings, options.adapter)
    output.claim(folder, overwrite=settings.run.overwrite, kind=output.EXPORT)
    lines = []
    if options.merge:
        agreement = merge(settings, options.adapter, folder)
        lines += [labelled("Merged", folder), labelled("Checked", agreement.text())]
    if options.state_dict:
        lines.append(labelled("Adapter", state_dict(options.adapter, folder)))
    facts = {"adapter": options.adapter, "base_model": settings.model.base_model, "merged": options.merge}
    storage.write_text(f"{folder}/export.yaml", yaml12.dump(facts))
    return [*lines, *serving(settings, options.adapter)]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge",
        action="store_true",
        help="Write the base with the adapter merged into it, in full precision.",
    )
    parser.add_argument(
        "--state_dict",
        "--state-dict",
        action="store_true",
        help=f"Write the adapter's tensors as {STATE_DICT}.",
    )


def check_full_precision(settings: Settings) -> None:
    """Raises ModelError for a base whose weights are stored quantised."""
    name = settings.model.base_model
    config: Any = settings.model.ref.config()
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is stored quantised, and an adapter is merged into full-precision weights only: give the model that it was made from "
            "with --model_name_or_path"
        )


def merge(settings: Settings, adapter: str, folder: str) -> Agreement:
    """Write the full-precision base with the adapter merged into it, its processor beside it; read it again
    and compare.

    The base is loaded in the type that it is stored in, or in --dtype; on a GPU if there is one. Memory: the
    model once.

    Raises:
        RuntimeError: the two differ by more than the tolerance.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.run.use_cpu else "cpu")
    processor: Any = settings.model.ref.processor()
    example, layout = _prompt(settings, processor)
    base = _load(settings, settings.model.ref, device)
    adapted: Any = load_adapter(base, adapter)
    wanted = _logits(adapted, layout, example)
    merged = adapted.merge_and_unload(safe_merge=True)  # raises where a merged weight is not finite
    dtype = str(merged.dtype).removeprefix("torch.")
    merged.config.use_cache = merged.config.get_text_config().use_cache = True  # off only for training
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
    storage.apply_umask(folder)
    del base, adapted, merged
    found = _logits(
        _load(settings, ModelRef(folder, trust_remote_code=settings.model.trust_remote_code), device),
        layout,
        example,
    )
    agreement = compare(found, wanted, TOLERANCES[dtype])
    if not agreement.difference <= agreement.tolerance:
        for path in Path(folder).iterdir():
            path.unlink()
        raise RuntimeError(
            f"the merged model does not compute what base and adapter do, and was deleted: {agreement.text()}"
        )
    return agreement


def _load(settings: Settings, ref: ModelRef, device: Any) -> Any:
    return load_base(
        ref,
        quantization="none",
        dtype=settings.model.dtype or "auto",
        device=device,
        attn_implementation=settings.model.attn_implementation,
    ).eval()


def _logits(model: Any, layout: Layout, example: EncodedExample) -> Any:
    """[T, V] float32 on the CPU."""
    import torch

    batch = layout.batch(model, [example])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[0].float().cpu()


def compare(found: Any, wanted: Any, tolerance: float) -> Agreement:
    """Two models' logits, float32 [T, V]."""
    difference = float((found - wanted).square().mean().sqrt() / wanted.std())
    equal = int((found.argmax(-1) == wanted.argmax(-1)).sum())
    return Agreement(difference, tolerance, equal, len(wanted))


def _prompt(settings: Settings, processor: Any) -> tuple[EncodedExample, Layout]:
    """The first row of the adapter's data that can be read, else a question about a drawn picture."""
    pixels = probe_pixel_format(processor)
    encoder = RowEncoder(processor, raw_pixels=pixels.raw)
    tokenizer = processor.tokenizer
    layout = Layout(
        pixels, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    for row in _rows(settings):
        try:
            return encoder.encode(row["messages"], [load_image(image) for image in row["images"]]), layout
        except (ImageError, EncodeError):
            continue
    question = [{"type": "image"}, {"type": "text", "text": "How many people are in this picture?"}]
    answer = [{"type": "text", "text": "There are 3 people."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return encoder.encode(messages, [gradient_image(320, 240)]), layout


def _rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """The good rows of the adapter's data, none where it is no longer there."""
    data = settings.data
    try:
        rules = {
            name: settings.value(name)
            for name in ("image_root", "allow_outside_paths", "allow_remote_images")
        }
        for piece in scan(data.data_path, **rules) if data.data_path else ():
            yield from (row for row in read_piece(piece) if row["error"] is None)
    except DataError as error:
        logger.info(labelled("", f"the check uses a drawn picture: {error}"))


def state_dict(adapter: str, folder: str) -> str:
    """Write the adapter's tensors, under the names of adapter_model.safetensors, for torch.load; returns the
    path."""
    import torch

    path = f"{folder}/{STATE_DICT}"
    torch.save(_tensors(adapter), path)
    return path


def _tensors(adapter: str) -> dict[str, Any]:
    from peft.utils.save_and_load import load_peft_weights

    return dict(load_peft_weights(adapter, device="cpu"))


def serving(settings: Settings, adapter: str) -> list[str]:
    """Whether vLLM takes the adapter as it is, and with which options, in lines to print."""
    empty = settings.model.ref.outline()
    base, config = settings.model.base_model, empty.config
    prefix = language_prefix(empty)
    adapter_config = json.loads((Path(adapter) / "adapter_config.json").read_bytes())
    reasons = refusals(
        adapter_config, [*_tensors(adapter)], model_type=config.model_type, language_prefix=prefix
    )
    if reasons:
        return [labelled("vLLM", f"would not take the adapter as it is: {reason}") for reason in reasons]
    rank = max_lora_rank(adapter_config["r"])
    option = "" if rank is None or rank <= DEFAULT_RANK else f" --max-lora-rank {rank}"
    command = f"vllm serve {base} --enable-lora{option} --lora-modules tuned={Path(adapter).absolute()}"
    return [labelled("vLLM", command)]
