"""The folder of a finished adapter: what is in it, and that plain transformers and PEFT use it."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training_kit import Run, values_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.training.save import save_adapter_folder


@pytest.fixture
def saved(
    run_loop: Callable[..., Run], stores: dict[str, Store], models: Path, tmp_path: Path
) -> tuple[Run, Path, Settings]:
    options = {"max_steps": 2, "learning_rate": 1e-2, "overwrite": True, "quantization": "int8"}
    run = run_loop("mixed mllama", **options)
    (run.checkpoint() / "scaler.pt").touch()  # as with fp16
    (run.checkpoint() / "rng_state_1.pth").touch()  # as with two workers
    settings = Settings.from_flags(values_of(stores["mixed mllama"], models / "mllama", **options))
    out = tmp_path / "out"
    save_adapter_folder(
        str(run.checkpoint()), out.as_uri(), settings, run.reports[-1], stores["mixed mllama"]
    )
    return run, out, settings


def test_the_folder_is_that_of_an_adapter_and_not_of_a_checkpoint(
    saved: tuple[Run, Path, Settings], stores: dict[str, Store]
):
    run, out, settings = saved
    assert {path.name for path in out.iterdir()} == {
        *(
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "processor_config.json",
            "tokenizer.json",
        ),
        *("tokenizer_config.json", "config.yaml", "metrics.json", "README.md"),
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert {name: metrics[name] for name in run.reports[-1]} == run.reports[-1]
    assert metrics["data"] == stores["mixed mllama"].meta.key
    assert metrics["versions"]["peft"] == version("peft")
    assert Settings.load(out / "config.yaml") == settings.replace(overwrite=False)
    assert settings.run.overwrite
    assert not Settings.load(out / "config.yaml").run.overwrite


def test_the_card_says_what_it_was_made_from(saved: tuple[Run, Path, Settings], models: Path):
    run, out, _ = saved
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: mllama\nlibrary_name: peft\n")
    assert (
        f"| evaluation loss (all 5 evaluation rows, full length) | {run.reports[-1]['eval_loss']:.4f} |"
        in card
    )
    assert "| rows for training / evaluation / test | 11 / 5 / 0 |" in card
    assert "| base weights while training | int8 |" in card


def test_plain_transformers_and_peft_load_it(saved: tuple[Run, Path, Settings], models: Path):
    _, out, _ = saved
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(text="<|begin_of_text|>What is rebar?", add_special_tokens=False, return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(models / "mllama").eval()
    with torch.no_grad():
        before = base(**inputs).logits
        model = PeftModel.from_pretrained(base, out).eval()
        after = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert (after - before).abs().max() > 1e-3
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
