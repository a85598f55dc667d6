"""`eval.py`: what it writes and prints, that its numbers are those of training, and everything that can be
wrong with what it is given."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.cli.adapter_options import parse_evaluate
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.evaluation.evaluate import EvaluateResult, evaluate_adapter
from vlmtune.evaluation.generate import answers
from vlmtune.evaluation.metrics import METRICS, exact_match
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_ray")


def run(*options: Any) -> EvaluateResult:
    return evaluate_adapter(parse_evaluate([str(option) for option in options], "", "eval"))


def test_the_command_compares_adapter_and_base_on_rows_that_no_search_saw(
    adapters: dict[str, Path], models: Path, mall: Path, tmp_path: Path
) -> None:
    program = [
        sys.executable,
        str(ROOT / "ray_jobs" / "eval.py"),
        "--adapter",
        str(adapters["llava"]),
        "--compare_base",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "--output_dir", "out", "--max_new_tokens", "8", "--use_cpu"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "Loading …"
    assert lines[0] == f"Model     {models / 'llava'} (nf4) + {adapters['llava']}"
    assert lines[1] == f"Data      {mall}: 6 rows (test)"
    shown = [name for name in METRICS if name not in ("iou", "point_in_box")]  # no reference has a box
    assert [line.split()[0] for line in lines[4 : 4 + len(shown)]] == shown
    assert lines[3].split() == ["adapter", "base", "difference"]
    assert lines[-2:] == [
        f"Metrics   {tmp_path}/out/metrics.json",
        f"Answers   {tmp_path}/out/predictions.parquet",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "eval.yaml",
        "metrics.json",
        "predictions.parquet",
    }

    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert len(rows) == 6
    assert {
        "row",
        "source",
        "question",
        "reference",
        "answer",
        "base_answer",
        "nll",
        "base_nll",
        "tokens",
    } == rows[0].keys()
    assert rows[0]["question"] == "How many people are in this picture of the mall?"
    assert rows[1]["question"].startswith("이 쇼핑몰 사진에")
    assert rows[0]["reference"] + "명" == rows[1]["reference"]
    assert any(row["answer"] != row["base_answer"] for row in rows)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        metrics["adapter"]["exact_match"]["value"]
        == sum(exact_match(row["answer"], row["reference"]) for row in rows) / 6
    )
    assert metrics["adapter"]["perplexity"]["value"] < metrics["base"]["perplexity"]["value"]
    difference = metrics["adapter"]["perplexity"]["value"] - metrics["base"]["perplexity"]["value"]
    assert metrics["difference"]["perplexity"]["value"] == pytest.approx(difference)
    assert (metrics["split"], metrics["rows"], metrics["groups"]) == ("test", 6, 3)
    low, high = (metrics["adapter"]["perplexity"][end] for end in ("low", "high"))
    assert low <= metrics["adapter"]["perplexity"]["value"] <= high

    # The same answers without Ray, as a trial of a search asks for them.
    (store,) = (adapters["llava"].parent / "cache" / "vlmtune" / "prepared").glob(f"{metrics['data']}.*")
    base = load_base(
        ModelRef(str(models / "llava")), quantization="nf4", dtype="float32", device=torch.device("cpu")
    )
    processor = ModelRef(str(models / "llava")).processor()
    numbers = [row["row"] for row in rows]
    assert answers(base, processor, Store(str(store)), numbers, max_new_tokens=8, batch_size=4) == [
        row["base_answer"] for row in rows
    ]


def test_perplexity_is_the_eval_loss_of_training(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(
        "--adapter",
        adapters["mllama"],
        "--split",
        "eval",
        "--output_dir",
        out,
        "--max_new_tokens",
        2,
        "--metrics",
        "perplexity,rouge_l",
    )
    metrics = json.loads((out / "metrics.json").read_text())
    trained = json.loads((adapters["mllama"] / "metrics.json").read_text())
    assert math.log(metrics["adapter"]["perplexity"]["value"]) == pytest.approx(
        trained["eval_loss"], rel=1e-4
    )
    assert list(metrics["adapter"]) == ["perplexity", "rouge_l"]
    assert "other data" not in capsys.readouterr().out
    assert metrics["data"] == trained["data"]


def test_base_only_on_other_data_takes_all_its_rows(
    adapters: dict[str, Path], mall: Path, tmp_path: Path
) -> None:
    rows = [
        {"image": f"{mall}/frames/seq_00000{number}.jpg", "instruction": "How many?", "output": "3"}
        for number in (1, 2)
    ]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--image_root", mall, "--base_only", "--output_dir", tmp_path / "out", "--max_new_tokens", 2)
    run("--adapter", adapters["llava"], "--data_path", tmp_path / "few.jsonl", *options)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"base"} == metrics.keys() & {"adapter", "base", "difference"}
    assert (metrics["rows"], metrics["split"]) == (2, "all")
    assert "base_answer" not in pq.read_table(tmp_path / "out" / "predictions.parquet").column_names


def changed(adapter: Path, folder: Path, **config: Any) -> Path:
    """A copy of an adapter with a changed adapter_config.json."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoints", "runs"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def narrower(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter for layers of half the width."""
    changed(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    halved = {
        name: tensor[:, : tensor.shape[1] // 2].contiguous() if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(halved, folder / "adapter_model.safetensors")
    return folder


def test_bad_adapters_are_one_plain_line_and_nothing_is_written(
    adapters: dict[str, Path], models: Path, tmp_path: Path
) -> None:
    llava = adapters["llava"]
    cases: list[tuple[list[Any], type[Exception], str]] = [
        ([], ConfigError, "--adapter is missing"),
        (
            ["--adapter", tmp_path / "absent"],
            ModelError,
            r"absent is not an adapter: it has no adapter_config\.json",
        ),
        (
            ["--adapter", models / "llava"],
            ModelError,
            r"llava is not an adapter: it has no adapter_config\.json",
        ),
        (
            ["--adapter", llava, "--model_name_or_path", models / "mllama"],
            ModelError,
            r"llava does not fit the base .*mllama: ",
        ),
        (["--adapter", llava, "--model_name_or_path", tmp_path / "gone"], ModelError, "gone is not there"),
        (
            ["--adapter", changed(llava, tmp_path / "rank", r=8)],
            ModelError,
            r"does not fit the base .*size mismatch",
        ),
        (
            ["--adapter", changed(llava, tmp_path / "more", target_modules=["q_proj", "gate_proj"])],
            ModelError,
            "does not fit the base",
        ),
        (
            ["--adapter", narrower(llava, tmp_path / "narrow")],
            ModelError,
            r"does not fit the base .*size mismatch",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            run(*options, "--output_dir", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_options_and_data_are_one_plain_line_and_nothing_is_written(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"instruction": "How many?"}\n' * 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    cases: list[tuple[list[Any], type[Exception], str]] = [
        (
            ["--metrics", "exact_mach"],
            ConfigError,
            r"--metrics exact_mach: there is no such metric; .*did you mean exact_match\?",
        ),
        (
            ["--data_path", tmp_path / "questions.jsonl"],
            DataError,
            r"no row has a reference answer to compare with .*predict\.py answers",
        ),
        (["--data_path", tmp_path / "empty"], DataError, "empty holds nothing"),
        (["--data_path", tmp_path / "absent"], DataError, "absent: no such file or folder"),
        (["--split", "tset"], ConfigError, "--split: invalid choice: 'tset'"),
        (
            ["--split", "test", "--test_fraction", "0"],
            DataError,
            "--split test: the data has no such rows; --split all takes every row",
        ),
        (["--max_new_tokens", "0"], ConfigError, "--max_new_tokens: '0' is not a whole number of at least 1"),
        (["--lora_r", "8"], ConfigError, "--lora_r: this command has no such option"),
        (["--quantization", "nf5"], ConfigError, "--quantization: 'nf5' is not one of"),
        (["--output_dir", tmp_path / "other"], ConfigError, "is not empty and holds no run of vlmtune"),
        (["--output_dir", adapters["llava"]], ConfigError, "is not empty and holds no run of vlmtune"),
        (
            ["--output_dir", adapters["llava"], "--overwrite"],
            ConfigError,
            "is not empty and holds no run of vlmtune",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            run("--adapter", adapters["llava"], "--output_dir", tmp_path / "out", *options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
