"""What stands before the first step, on a machine without a GPU and on one whose GPU is old."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.training.trl_arguments import training_arguments


@pytest.mark.parametrize(
    ("options", "flag"), [({"bf16": True}, "--bf16 true"), ({"dtype": "bfloat16"}, "--dtype bfloat16")]
)
def test_a_gpu_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], flag: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    settings = Settings.from_flags({"data_path": "x", "model_name_or_path": "y", **options})
    with pytest.raises(ConfigError) as caught:
        training_arguments(settings, str(tmp_path), checkpointing=False)
    assert (
        str(caught.value)
        == f"{flag}: Tesla T4 does not compute in bfloat16; leave it out, and float32 is used"
    )


def test_arguments_without_a_gpu(tmp_path: Path) -> None:
    settings = Settings.from_flags(
        {"data_path": "x", "model_name_or_path": "y", "use_cpu": True, "activation_offloading": True}
    )
    arguments = training_arguments(settings, str(tmp_path), checkpointing=True)
    assert (arguments.bf16, arguments.activation_offloading, arguments.torch_compile) == (False, False, False)
    assert arguments.output_dir == str(tmp_path)
