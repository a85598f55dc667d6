"""`export.py`: a merged model that plain transformers loads and that computes what base and adapter do, and
the adapter as one file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.cli.adapter_options import parse_export
from vlmtune.cli.commands import export_lines
from vlmtune.errors import ConfigError, ModelError
from vlmtune.evaluation import export as module
from vlmtune.evaluation.export import ExportResult, export_adapter
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef

ROOT = Path(__file__).parents[2]


def run(*options: Any) -> ExportResult:
    return export_adapter(parse_export([str(option) for option in options], "", "export"))


def test_the_command_merges_llava_and_writes_the_state_dict(
    adapters: dict[str, Path], models: Path, tmp_path: Path
) -> None:
    program = [
        sys.executable,
        str(ROOT / "ray_jobs" / "export.py"),
        "--adapter",
        str(adapters["llava"]),
        "--merge",
        "--state_dict",
    ]
    done = subprocess.run(
        [*program, "--output_dir", "out", "--use_cpu"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    loading, merged, checked, adapter, serve, upload = done.stdout.splitlines()
    assert loading == "Loading …"
    out = tmp_path / "out"
    assert merged == f"Merged    {out}"
    assert checked.startswith("Checked   logits differ by ")
    assert "(tolerance 0.0001)" in checked
    assert adapter == f"Adapter   {out}/lora_adapter_state_dict.pt"
    assert serve == f"Serve     vllm serve {out}", "what was written, not the adapter that it was made from"
    assert upload == f"Upload    hf upload OWNER/NAME {out}"

    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, (
        "others may read the weights as they may read the rest"
    )

    model = AutoModelForImageTextToText.from_pretrained(out)
    base = AutoModelForImageTextToText.from_pretrained(models / "llava")
    assert (
        AutoProcessor.from_pretrained(out).tokenizer.get_vocab()
        == AutoProcessor.from_pretrained(models / "llava").tokenizer.get_vocab()
    )
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert differing == [
        name
        for name in theirs
        if "language_model" in name and any(f".{part}_proj" in name for part in "qkvo")
    ]
    assert model.config.text_config.use_cache
    saved = torch.load(out / "lora_adapter_state_dict.pt", weights_only=True)
    expected = load_file(adapters["llava"] / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_mllama_trained_in_8_bits_merges_into_full_precision_and_vllm_does_not_take_it(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    result = run("--adapter", adapters["mllama"], "--merge", "--output_dir", tmp_path / "out", "--use_cpu")
    lines = list(export_lines(result))
    assert lines[1].startswith("Checked   logits differ by ")
    assert lines[-3].startswith("vLLM      would not take the adapter as it is: Llama-3.2-Vision left vLLM")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_half_precision_has_its_own_tolerance(adapters: dict[str, Path], tmp_path: Path) -> None:
    result = run(
        "--adapter",
        adapters["llava"],
        "--merge",
        "--output_dir",
        tmp_path / "out",
        "--use_cpu",
        "--dtype",
        "bfloat16",
    )
    assert result.merge_check is not None and "(tolerance 0.05)" in result.merge_check.text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merged_weights_are_stored_smaller_and_their_loss_is_told(
    adapters: dict[str, Path], tmp_path: Path, quantization: str, one_ray: None
) -> None:
    options = ("--adapter", adapters["llava"], "--merge", "--quantization", quantization, "--use_cpu")
    result = run(*options, "--output_dir", tmp_path / "out")
    loss = result.quantized_loss
    assert loss is not None
    trained = json.loads((adapters["llava"] / "metrics.json").read_text())
    assert loss.rows == 6 and loss.unmerged == pytest.approx(trained["eval_loss"], rel=1e-3)
    assert loss.merged == pytest.approx(loss.unmerged, rel=0.2) and loss.merged != loss.unmerged
    printed = (
        f"merged in {quantization}, {loss.unmerged:.4g} with the adapter on the base in nf4 (6 eval rows)"
    )
    assert any(line.startswith("Loss      eval_loss ") and printed in line for line in export_lines(result))
    out = tmp_path / "out"
    assert not [path for path in out.iterdir() if path.is_dir()], "the full-precision model is gone"
    model = AutoModelForImageTextToText.from_pretrained(out, device_map={"": "cpu"})
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert ({"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]) in kinds
    assert AutoProcessor.from_pretrained(out).chat_template


def test_without_its_data_a_quantized_merge_has_no_loss(
    adapters: dict[str, Path], tmp_path: Path, one_ray: None
) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(adapters["llava"], moved)
    config = moved / "config.yaml"
    text = re.sub("data_path: .*", "data_path: /nowhere/mall", config.read_text())
    config.write_text(text)
    options = ("--adapter", moved, "--merge", "--quantization", "nf4", "--use_cpu")
    result = run(*options, "--output_dir", tmp_path / "out")
    assert result.quantized_loss is None
    assert not any(line.startswith("Loss") for line in export_lines(result))


def test_a_merge_that_went_wrong_is_not_left_behind(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOLERANCES, "float32", 0.0)
    with pytest.raises(
        RuntimeError, match="does not compute what base and adapter do, and was deleted: logits differ by"
    ):
        run("--adapter", adapters["llava"], "--merge", "--output_dir", tmp_path / "out", "--use_cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_is_one_plain_line_and_nothing_is_written(
    adapters: dict[str, Path], models: Path, tmp_path: Path
) -> None:
    four_bits = load_base(
        ModelRef(str(models / "llava")), quantization="nf4", dtype="float32", device=torch.device("cpu")
    )
    four_bits.save_pretrained(tmp_path / "nf4")
    AutoProcessor.from_pretrained(models / "llava").save_pretrained(tmp_path / "nf4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    cases: list[tuple[list[Any], type[Exception], str]] = [
        ([], ConfigError, "nothing to export: give --merge, --state_dict, or both"),
        (
            ["--merge", "--quantization", "fp8"],
            ConfigError,
            "are stored in full precision, nf4 or int8",
        ),
        (["--state_dict", "--quantization", "nf4"], ConfigError, "--quantization nf4: .* add --merge"),
        (
            ["--merge", "--model_name_or_path", tmp_path / "nf4"],
            ModelError,
            "nf4 is stored quantized, and an adapter is merged into full-",
        ),
        (["--merge", "--model_name_or_path", models / "mllama"], ModelError, "does not fit the base"),
        (["--state_dict", "--adapter", tmp_path], ModelError, "is not an adapter"),
        (
            ["--merge", "--output_dir", tmp_path / "full"],
            ConfigError,
            "is not empty and holds no run of vlmtune",
        ),
        (
            ["--merge", "--output_dir", adapters["llava"], "--overwrite"],
            ConfigError,
            "is not empty and holds no run of vlmtune",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            run("--adapter", adapters["llava"], "--output_dir", tmp_path / "out", *options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
