"""Stores a merged model in 4 or 8 bits, and compares its loss with that of base and adapter."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune import storage
from vlmtune.cluster import connect
from vlmtune.config.options import Quantization
from vlmtune.config.settings import Settings
from vlmtune.console import console_line, format_value
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.examples import read_examples
from vlmtune.data.source import DataSource
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.errors import UserError
from vlmtune.evaluation.adapter import load_model, read_adapter_files
from vlmtune.evaluation.generate import BatchBuilder, likelihoods
from vlmtune.model.base import bitsandbytes_config, load_base, resolve_dtype
from vlmtune.model_ref import ModelRef
from vlmtune.session import cache_folder

logger = logging.getLogger(__name__)

MAX_ROWS = 256  # on which the losses are measured, row by row, once with each model


@dataclass(frozen=True)
class QuantizedLoss:
    """The loss of the quantized merged model, and that of base and adapter as they were trained.

    Attributes:
        quantization: (of the merged model, of the base on which the adapter was trained).
        merged, unmerged: loss per labelled token of `rows` evaluation rows.
    """

    quantization: tuple[str, str]
    merged: float
    unmerged: float
    rows: int

    def text(self) -> str:
        stored, trained = self.quantization
        base = "the full-precision base" if trained == "none" else f"the base in {trained}"
        merged, unmerged = format_value(self.merged), format_value(self.unmerged)
        return (
            f"eval_loss {merged} merged in {stored}, {unmerged} with the adapter on {base} "
            f"({self.rows} eval rows)"
        )


def write_quantized(
    settings: Settings, merged: str, folder: str, quantization: Quantization, device: Any
) -> None:
    """Write a merged model again in `quantization` ("nf4" or "int8"), with transformers.

    Args:
        merged: folder of the full-precision model and its processor; it is deleted.
        folder: where the quantized model goes.
    """
    from transformers import AutoModelForImageTextToText

    ref = ModelRef(merged, trust_remote_code=settings.model.trust_remote_code)
    config = ref.config()
    dtype = resolve_dtype(settings.model.dtype, config, device)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        merged,
        config=config,
        dtype=dtype,
        device_map={"": str(device)},
        quantization_config=bitsandbytes_config(quantization, dtype, settings.model.use_bnb_nested_quant),
        trust_remote_code=ref.trust_remote_code,
    )
    model.save_pretrained(folder)
    weights = {path.name for path in Path(folder).iterdir()}
    for path in Path(merged).iterdir():
        if path.name not in weights and not path.name.startswith(("model", "pytorch_model")):
            shutil.copyfile(path, f"{folder}/{path.name}")
    shutil.rmtree(merged)
    storage.apply_umask(folder)


def measure_losses(
    settings: Settings, adapter: str, folder: str, quantization: Quantization, device: Any
) -> QuantizedLoss | None:
    """The losses on the adapter's evaluation rows; None if the data is no longer there, which is logged.

    Args:
        settings: settings of the adapter's training, with its quantization.
        folder: folder of the quantized merged model.
    """
    try:
        connect()
        store = find_or_make_store(
            DataSource.from_settings(settings), cache_folder(settings), size_gb=settings.data.cache_size_gb
        )
    except UserError as error:
        logger.info(console_line("", f"the loss is not measured: {error}"))
        return None
    numbers = [int(row) for row in store.rows_of(EVAL)[:MAX_ROWS]]
    if not numbers:
        logger.info(console_line("", "the loss is not measured: the data has no eval rows"))
        return None
    builder = BatchBuilder.of(store)
    trained_model = load_model(settings, {"adapter": read_adapter_files(adapter)}, device)
    unmerged = mean_loss(trained_model, builder, store, numbers)
    del trained_model
    merged_model = load_base(
        ModelRef(folder, trust_remote_code=settings.model.trust_remote_code),
        quantization=quantization,
        dtype=settings.model.dtype,
        device=device,
        attn_implementation=settings.model.attn_implementation,
    ).eval()
    merged = mean_loss(merged_model, builder, store, numbers)
    trained = settings.model.base_quantization
    return QuantizedLoss((quantization, trained), merged, unmerged, len(numbers))


def mean_loss(model: Any, builder: BatchBuilder, store: Store, rows: list[int]) -> float:
    """The mean negative log-likelihood of all labelled tokens of some rows."""
    terms = [likelihoods(model, builder, [example])[0] for example in read_examples(store, rows)]
    return sum(loss for loss, _ in terms) / max(sum(tokens for _, tokens in terms), 1)
