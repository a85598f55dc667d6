"""The pretraining of the demo's base, once through at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

from vlmtune.demo import pretrain
from vlmtune.demo.trained import BASE
from vlmtune.model_ref import ModelRef


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [pretrain.learning_rate_factor(step, 200) for step in range(200)]
    assert factors[0] < 0.2 and max(factors) > 0.98 and factors[-1] < 0.01
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_the_script_makes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "HELD_BACK", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        pretrain.main(["--output_dir", str(tmp_path), "--images", "16", "--steps", "2", "--batch", "4"]) == 0
    )
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["step"] == 2 and line["answers"] < 8
    assert {path.name for path in BASE.iterdir()} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "unfinished.pt").exists()
    from vlmtune.model.base import load_base

    assert (
        load_base(ModelRef(str(tmp_path)), quantization="nf4", dtype=None, device=torch.device("cpu")).dtype
        == torch.float32
    )
