"""The files that a packed trial resumes from."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerState

from vlmtune.packed.trial_checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, TrialCheckpoint

LAYERS = ["model.layers.0.q_proj", "model.layers.0.v_proj"]


def make_checkpoint() -> TrialCheckpoint:
    adapter = {layer: (torch.randn(2, 6), torch.randn(4, 2)) for layer in LAYERS}
    optimizer = {"flat": {"exp_avg": torch.randn(40)}, "parts": [{}, {}], "schedule": {"last_epoch": 3}}
    state = TrainerState(global_step=3, max_steps=8, epoch=0.5, log_history=[{"loss": 1.5, "step": 2}])
    return TrialCheckpoint(adapter, optimizer, state)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = make_checkpoint()
    written.write(tmp_path)
    read = TrialCheckpoint.read(str(tmp_path), LAYERS)
    for layer in LAYERS:
        assert all(map(torch.equal, read.adapter[layer], written.adapter[layer]))
    assert torch.equal(read.optimizer["flat"]["exp_avg"], written.optimizer["flat"]["exp_avg"])
    assert read.optimizer["schedule"] == written.optimizer["schedule"]
    assert read.state == written.state


def test_its_files_have_the_names_that_peft_and_older_searches_know(tmp_path: Path) -> None:
    make_checkpoint().write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
    }
    assert {ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE} == {path.name for path in tmp_path.iterdir()}
    names = load_file(tmp_path / ADAPTER_FILE).keys()
    assert "base_model.model.model.layers.0.q_proj.lora_A.weight" in names
    assert len(names) == 2 * len(LAYERS)
