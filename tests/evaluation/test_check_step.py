"""The self-check in the isolated runner: a fault is named and left out; a right step stays as it is."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from training_kit import Run, difference

import vlmtune.model.step as step_module
from vlmtune.model.acceleration import Acceleration
from vlmtune.model.fast import skip_padding_mask

RunLoop = Callable[..., Run]


def faulty_mask(base: Any) -> Acceleration:
    """Leaves the padding mask out, and half of what the decoder gets with it."""
    acceleration = skip_padding_mask(base)
    decoder = base.get_decoder()
    forward = decoder.forward

    @wraps(forward)
    def halved(*args: Any, **kwargs: Any) -> Any:
        if acceleration.on and kwargs.get("past_key_values") is None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * 0.5
        return forward(*args, **kwargs)

    decoder.forward = halved
    return acceleration


def notes(run: Run) -> list[str]:
    return [str(step["note"]) for step in run.steps if "note" in step]


def test_a_fault_is_named_and_left_out(run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 2, "lora_target_modules": ["q_proj"], "quantization": "none"}
    right = run_loop("mixed llava", **settings)
    assert not [note for note in notes(right) if "self-check" in note]
    monkeypatch.setattr(step_module, "skip_padding_mask", faulty_mask)
    settings["lora_target_modules"] = ["v_proj"]
    unchecked = run_loop("mixed llava", **settings, self_check=False)
    found = run_loop("mixed llava", **settings)
    (line,) = [note for note in notes(found) if "self-check" in note]
    assert "attention without padding mask left out" in line and "losses differ" in line
    known = run_loop("mixed llava", **settings)
    (again,) = [note for note in notes(known) if "self-check" in note]
    assert "of an earlier run" in again
    monkeypatch.undo()
    right = run_loop("mixed llava", **settings, self_check=False)
    assert difference(found.adapter(), right.adapter()) < 1e-5
    assert difference(known.adapter(), right.adapter()) < 1e-5
    assert difference(unchecked.adapter(), right.adapter()) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_check_changes_no_bit(run_loop: RunLoop, dropout: float) -> None:
    settings = {"max_steps": 3, "lora_target_modules": ["k_proj"], "lora_dropout": dropout}
    with_check, without = (run_loop("mixed llava", **settings, self_check=check) for check in (True, False))
    assert with_check.losses() == without.losses()
    for name, tensor in with_check.adapter().items():
        assert torch.equal(tensor, without.adapter()[name]), name
