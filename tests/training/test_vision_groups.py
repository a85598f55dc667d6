"""The vision tower and projector train with a learning rate of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_kit import Run

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.packed.packable import not_packable

RunLoop = Callable[..., Run]
BOTH: dict[str, Any] = {
    "lora_vision": True,
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["multi_modal_projector"],
    "quantization": "none",
    "max_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


def test_each_part_moves_by_its_own_rate(run_loop: RunLoop) -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    moved = run_loop("mall llava", **BOTH, learning_rate=1e-3, vision_learning_rate=1e-5).adapter()
    largest = {"language": 0.0, "vision": 0.0}
    for name, tensor in moved.items():
        if "lora_B" in name:
            part = "language" if ".language_model." in name else "vision"
            largest[part] = max(largest[part], tensor.abs().max().item())
    assert largest["language"] == pytest.approx(1e-3, rel=0.01)
    assert largest["vision"] == pytest.approx(1e-5, rel=0.01)
    one_rate = run_loop("mall llava", **BOTH, learning_rate=1e-3).adapter()
    changed = [name for name in moved if not torch.equal(moved[name], one_rate[name])]
    assert changed and not any(".language_model." in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)


def test_it_needs_something_to_train_there() -> None:
    with pytest.raises(ConfigError, match="vision_learning_rate: nothing is trained beside"):
        Settings.from_flags({"vision_learning_rate": 1e-5})
    reason = not_packable(Settings.from_flags({"vision_learning_rate": 1e-5, "lora_vision": True}))
    assert reason == "lora_vision"
