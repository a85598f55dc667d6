"""The preflight says how steps will run, and why not faster."""

from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.settings import Settings
from vlmtune.preflight.gpu_steps import gpu_acceleration_lines


def lines(model: Path, **flags: Any) -> str:
    return "\n".join(gpu_acceleration_lines(Settings.from_flags({"model_name_or_path": str(model), **flags})))


def test_a_model_that_allows_everything(models: Path) -> None:
    found = lines(models / "llava")
    for line in (
        "packed: yes",
        "CUDA graphs: the decoder and the vision tower",
        "cached vision features: yes",
        "self-check: before the first step",
    ):
        assert line in found
    assert "experts" not in found


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"use_dora": True}, "packed: no, it cannot train use_dora"),
        ({"use_dora": True}, "CUDA graphs: no, because of --use_dora"),
        ({"lora_vision": True}, "cached vision features: no, the vision tower"),
        ({"self_check": False}, "self-check: no, --self_check false"),
        ({"torch_compile": False}, "compiled layers: no, --torch_compile false"),
    ],
)
def test_why_not(models: Path, flags: dict[str, Any], line: str) -> None:
    assert line in lines(models / "llava", **flags)


def test_a_model_without_image_features(models: Path, tmp_path: Path) -> None:
    assert gpu_acceleration_lines(Settings.from_flags({"model_name_or_path": str(tmp_path)})) == []
