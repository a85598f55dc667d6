"""Recorded steps give what the same steps give as they are. Needs a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fast import batch, relative

from vlmtune.demo.models import write_model
from vlmtune.model.base import load_base
from vlmtune.model.capture import CAPTURE_STOPPED, WARM_UP_CALLS, install_capturing, remove_capturing
from vlmtune.model.fast import (
    decoder_and_other_parts,
    disable_autocast,
    disable_vision_gradient,
    lean_lora,
    skip_padding_mask,
)
from vlmtune.model.lora import attach, lora_config
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]


def fast_model(folder: Path, quantization: str, dropout: float) -> tuple[Any, Any]:
    base = load_base(
        ModelRef(str(folder)), quantization=quantization, dtype="bfloat16", device=torch.device("cuda")
    )  # type: ignore[arg-type]
    targets = target_modules(base, None, lora_vision=False)
    model = attach(base, lora_config(base, r=4, alpha=8, dropout=dropout, target_modules=targets), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    lean_lora(model)
    disable_vision_gradient(base)
    skip_padding_mask(base)
    disable_autocast(model)
    return model.train(), base


def padded(inputs: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    """The batch with `more` tokens of padding."""
    out = {name: tensor.cuda() for name, tensor in inputs.items()}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        out[name] = torch.nn.functional.pad(out[name], (0, more), value=fill)
    if "cross_attention_mask" in out:
        out["cross_attention_mask"] = torch.nn.functional.pad(
            out["cross_attention_mask"], (0, 0, 0, 0, 0, more)
        )
    return out


@pytest.mark.parametrize("family", ["llava", "mllama"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8", "fp8"])
def test_replayed_steps_equal_plain_ones(tmp_path: Path, family: str, quantization: str):
    write_model(family, tmp_path)
    plain, _ = fast_model(tmp_path, quantization, 0.0)
    recorded, base = fast_model(tmp_path, quantization, 0.0)
    failures: list[str] = []
    for part in decoder_and_other_parts(base):
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        install_capturing(part, partial(list, trained), failures.append)
    inputs = batch(tmp_path)
    for _ in range(WARM_UP_CALLS + 2):
        for model in (plain, recorded):
            model.zero_grad()
        for more in (0, 8, 0):  # the first shape twice in a step: its gradients must add up
            losses = [model(**padded(inputs, more)).loss for model in (plain, recorded)]
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(losses[1].detach(), losses[0].detach(), rtol=1e-3, atol=0)
            del loss, losses  # a graph of autograd that is still held would tie the parameters to this stream
        found, expected = (
            {
                name: parameter.grad
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            for model in (recorded, plain)
        )
        assert relative(found, expected) < 2e-2
    assert failures == []
    assert len(base.get_decoder().forward.graphs) == 2


def test_dropout_differs_from_step_to_step(tmp_path: Path):
    write_model("llava", tmp_path)
    model, base = fast_model(tmp_path, "none", 0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    install_capturing(base.get_decoder(), lambda: trained, pytest.fail)
    losses = {model(**padded(batch(tmp_path), 0)).loss.item() for _ in range(WARM_UP_CALLS + 5)}
    assert len(losses) == WARM_UP_CALLS + 5
    assert len(base.get_decoder().forward.graphs) == 1


def test_what_has_no_room_is_not_recorded_and_what_was_recorded_gives_room(monkeypatch: pytest.MonkeyPatch):
    module, failures = torch.nn.Linear(8, 8, device="cuda").train(), []
    plain = module.forward
    parameters = list(module.parameters())
    install_capturing(module, lambda: parameters, failures.append)

    def run(rows: int) -> None:
        for _ in range(WARM_UP_CALLS + 1):
            module(torch.ones(rows, 8, device="cuda")).sum().backward()

    assert not remove_capturing(module), "nothing was recorded, and what comes may have room"
    run(1)
    assert len(module.forward.graphs) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
        run(2**20)
    assert len(module.forward.graphs) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert failures == []
    assert remove_capturing(module)
    assert not remove_capturing(module)
    assert module.forward == plain
    assert failures == [CAPTURE_STOPPED]


def test_a_recording_that_runs_out_of_memory_is_no_failure():
    class Hungry(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return x * 2

    module, failures = Hungry().cuda().train(), []
    install_capturing(module, list, failures.append)
    for _ in range(WARM_UP_CALLS + 3):
        assert module(torch.ones(8, device="cuda")).sum() == 16
    assert failures == []
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_part_that_cannot_be_recorded_goes_on_as_it_was():
    class Reads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.dropout(x, 0.5)
            return x * float(x.sum())  # waits for the GPU

    module, failures = Reads().cuda().train(), []
    install_capturing(module, list, failures.append)
    for _ in range(WARM_UP_CALLS + 3):
        assert module(torch.ones(8, device="cuda")).shape == (8,)
    assert len(failures) == 1
    assert failures[0].startswith("no CUDA graphs of Reads, steps are slower: ")
    assert "previous error" not in failures[0], "the first error says what it was"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
