"""Write the folder of a finished adapter, with the files that users of transformers and PEFT expect."""

import json
import platform
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow.fs as pafs

from vlmtune import __version__
from vlmtune.checksums import CHECKSUMS
from vlmtune.config.settings import Settings
from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.data.store import Store
from vlmtune.data.template_source import template_of
from vlmtune.output import settings_yaml
from vlmtune.shown_text import shown_name
from vlmtune.storage import filesystem, write_json, write_text

CHECKPOINT_ONLY = (
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "scaler.pt",
    "training_args.bin",
    "report.json",
    CHECKSUMS,
    "README.md",
)
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "ray", "optuna")


def save_adapter_folder(
    checkpoint: str, folder: str, settings: Settings, metrics: dict[str, Any], store: Store
) -> None:
    """Write adapter, processor, `config.yaml`, model card and `metrics.json`. The last marks a finished run.

    Args:
        checkpoint: folder or URI of the checkpoint to save.
        settings: the settings that repeat the run.
    """
    copy_adapter(checkpoint, folder)
    write_chat_template(folder, settings)
    write_text(f"{folder}/config.yaml", settings_yaml(settings))
    write_card_and_metrics(folder, settings, metrics, store)


def write_chat_template(folder: str, settings: Settings) -> None:
    """Write `chat_template.jinja` if the base has no chat template, so that `apply_chat_template` works."""
    processor: Any = settings.model.ref.processor()
    if processor.chat_template is None and processor.tokenizer.chat_template is None:
        write_text(f"{folder}/chat_template.jinja", template_of(processor))


def usage_snippet(base: str, folder: str, image: str = "photo.jpg", question: str = "What is this?") -> str:
    """Python code that answers a question about an image with base and adapter, and prints the answer."""
    quoted = partial(json.dumps, ensure_ascii=False)
    return f"""import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained({quoted(folder)})
base = AutoModelForImageTextToText.from_pretrained({quoted(base)}, dtype="auto").to(device)
model = PeftModel.from_pretrained(base, {quoted(folder)}).eval()

image = Image.open({quoted(image)}).convert("RGB")
content = [
    {{"type": "image", "image": image}},
    {{"type": "text", "text": {quoted(question)}}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(device, base.dtype)
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def copy_adapter(checkpoint: str, folder: str) -> None:
    """Copy the adapter and processor of a checkpoint into another folder. Both are folders or URIs."""
    source, inner = filesystem(checkpoint)
    target, out = filesystem(folder)
    target.create_dir(out, recursive=True)
    for entry in source.get_file_info(pafs.FileSelector(inner)):
        is_adapter_file = (
            not entry.base_name.startswith("rng_state") and entry.base_name not in CHECKPOINT_ONLY
        )
        if entry.type == pafs.FileType.File and is_adapter_file:
            pafs.copy_files(
                entry.path,
                f"{out}/{entry.base_name}",
                source_filesystem=source,
                destination_filesystem=target,
            )


def write_card_and_metrics(
    folder: str,
    settings: Settings,
    metrics: dict[str, Any],
    store: Store,
    measured: Mapping[str, str] | None = None,
) -> None:
    """Write the model card and `metrics.json`. Called a second time after the comparison on test rows.

    Args:
        measured: further rows of the card's table, by their labels.
    """
    write_text(f"{folder}/README.md", model_card(settings, metrics, store, measured or {}))
    write_json(f"{folder}/metrics.json", {**metrics, "data": store.meta.key, "versions": versions()})


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    # vlmtune's version comes from its source, because in a Ray job it is not installed.
    return {
        "python": platform.python_version(),
        "vlmtune": __version__,
        **{name: version(name) for name in PACKAGES},
    }


def model_card(settings: Settings, metrics: dict[str, Any], store: Store, measured: Mapping[str, str]) -> str:
    """The adapter's README in the Hub's format, with base, data, settings, loss, and code to load it."""
    model = settings.model
    base = shown_name(model.base_model)
    counts = {split: len(store.rows_of(split)) for split in ("train", "eval", "test")}
    notes = serving_notes(ChatTemplate(settings.model.ref.processor()), settings.model.resolution)
    serving = "".join(f"- Serving: {note}\n" for note in notes) + "\n" if notes else ""
    results = "".join(f"| {name} | {value} |\n" for name, value in measured.items())
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: image-text-to-text
tags: [lora, vlmtune]
---

# LoRA adapter for {base}

| | |
|---|---|
{results}| evaluation loss (all {counts["eval"]} evaluation rows, full length) | {metrics["eval_loss"]:.4f} |
| rows for training / evaluation / test | {counts["train"]} / {counts["eval"]} / {counts["test"]} |
| rank, alpha, dropout | {settings.lora.r}, {settings.lora.alpha}, {settings.lora.dropout} |
| learning rate | {settings.training.learning_rate} |
| max_length | {settings.training.max_length} |
| base weights while training | {model.base_quantization} |

```python
{usage_snippet(base, "path/to/this/folder")}```

{serving}To repeat the run: `python ray_jobs/train.py --config config.yaml --output_dir NEW_FOLDER`.
"""
