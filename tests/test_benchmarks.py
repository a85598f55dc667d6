"""The benchmarks' two sides run on tiny models, so that they do not break on a GPU first."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from training_kit import values_of

from vlmtune.data.store import Store
from vlmtune.demo.models import write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import search
import search_quality
import train_step

IN_FLOAT32 = {"quantization": "none", "dtype": "float32", "bf16": "false", "gradient_checkpointing": "auto"}


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_both_sides_of_train_step_train_alike(family: str, tmp_path: Path):
    write_model(family, tmp_path)
    plain = {"bits": None, "dtype": "float32", "checkpointing": False, "same_start": True}
    case: dict[str, Any] = {
        "batch": 2,
        "tokens": 128,
        "image": True,
        "varied": True,
        "dropout": 0,
        "plain": plain,
        "ours": IN_FLOAT32,
    }
    steps = train_step.WARM_UP + 2
    expected = train_step.plain(str(tmp_path), case, steps)["losses"]
    assert train_step.ours(str(tmp_path), case, steps)["losses"] == pytest.approx(expected, rel=1e-3)


def test_the_search_benchmark_trains_its_curves(stores: dict[str, Store], models: Path, tmp_path: Path):
    values = values_of(stores["mall llava"], models / "llava", max_steps=4, eval_steps=2)
    points = [{"lora_r": 4, "learning_rate": 1e-3}, {"lora_r": 8, "learning_rate": 1e-2}]
    search_quality.train_part(points, values, stores["mall llava"], tmp_path / "curves.jsonl")
    curves = {row["lora_r"]: row["eval_loss"] for row in search_quality.read_lines(tmp_path / "curves.jsonl")}
    assert {rank: len(curve) for rank, curve in curves.items()} == {4: 2, 8: 2}


def test_results_of_several_calls_become_a_table_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shared = {
        "text": False,
        "set": [],
        "pixels": False,
        "side": "ours",
        "peak_gb": 60.0,
        "share_of_matmul": 0.75,
        "trials": 16,
    }
    results = [
        ("plain", 1, 450.0),
        ("packed", 1, 30.0),
        ("plain", 8, 90.0),
        ("packed", 8, 30.0),
        ("packed", 2, 30.0),
    ]
    files = []
    for number, (mode, batch, seconds) in enumerate(results):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(json.dumps({**shared, "mode": mode, "batch": batch, "ms_a_row": seconds}) + "\n")
    search.table([str(file) for file in files], str(tmp_path / "figure.svg"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" GB")[2].strip() for line in lines] == ["15.00x plain", "3.00x plain", ""]
    figure = (tmp_path / "figure.svg").read_text()
    assert figure.count("<circle") == 2
    assert "15.0 at 640" in figure
