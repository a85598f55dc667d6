"""The benchmarks' two sides run on tiny models, so that none is found broken on a lent GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest

from vlmtune.demo.models import write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_step

IN_FLOAT32 = {"quantization": "none", "dtype": "float32", "bf16": "false", "gradient_checkpointing": "auto"}


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_both_sides_of_train_step_train_alike(family: str, tmp_path: Path):
    write_model(family, tmp_path)
    plain = {"bits": None, "dtype": "float32", "checkpointing": False, "same_start": True}
    case: dict[str, Any] = {"batch": 2, "tokens": 128, "image": True, "varied": True, "dropout": 0, "plain": plain, "ours": IN_FLOAT32}
    steps = train_step.WARM_UP + 2
    expected = train_step.plain(str(tmp_path), case, steps)["losses"]
    assert train_step.ours(str(tmp_path), case, steps)["losses"] == pytest.approx(expected, rel=1e-3)
