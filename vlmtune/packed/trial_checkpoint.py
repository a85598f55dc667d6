"""`TrialCheckpoint`: the files from which a packed trial resumes: adapter, optimizer and trainer state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from vlmtune.packed.layers import Pair

ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"
PEFT_PREFIX = "base_model.model."  # prefix of the layers' names in PEFT's files


@dataclass(frozen=True)
class TrialCheckpoint:
    """The state of a trial after a step, on the CPU.

    Attributes:
        adapter: A `[R, D]` and B `[O, R]` by layer name.
        optimizer: the result of `AdapterOptimizer.state_dict`, in the layout of this adapter alone.
        state: transformers' trainer state: steps, epoch and log history.
    """

    adapter: dict[str, Pair]
    optimizer: dict[str, Any]
    state: TrainerState

    @classmethod
    def read(cls, folder: str, layers: Sequence[str]) -> TrialCheckpoint:
        """Read a local folder that `write` has written for an adapter of these layers."""
        tensors = load_file(f"{folder}/{ADAPTER_FILE}")
        adapter = {layer: (tensors[_key(layer, "A")], tensors[_key(layer, "B")]) for layer in layers}
        optimizer = torch.load(f"{folder}/{OPTIMIZER_FILE}", map_location="cpu", weights_only=True)
        return cls(adapter, optimizer, TrainerState.load_from_json(f"{folder}/{STATE_FILE}"))

    def write(self, folder: Path) -> None:
        tensors = {
            _key(layer, half): tensor
            for layer, pair in self.adapter.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        torch.save(self.optimizer, folder / OPTIMIZER_FILE)
        (folder / STATE_FILE).write_text(json.dumps(asdict(self.state), indent=2))


def _key(layer: str, half: str) -> str:
    """A tensor's name in PEFT's file."""
    return f"{PEFT_PREFIX}{layer}.lora_{half}.weight"
