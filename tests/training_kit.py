"""What tests of training share beside fixtures: the settings of a small run, what it left behind, and how
adapters are compared."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlmtune.config.settings import Settings
from vlmtune.data.order import BatchRows
from vlmtune.data.store import Store

Adapter = dict[str, torch.Tensor]


class InterruptedRunError(Exception):
    """Stands for whatever ends a run half-way."""


@dataclass
class Run:
    """What a run of the loop left behind."""

    folder: Path
    reports: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, BatchRows, int | None]] = field(
        default_factory=list
    )  # split, batch, max_length
    steps: list[dict[str, float]] = field(default_factory=list)
    model: Any = None

    def adapter(self, step: int | None = None) -> Adapter:
        return load_file(self.checkpoint(step) / "adapter_model.safetensors")

    def checkpoint(self, step: int | None = None) -> Path:
        return self.folder / f"checkpoint-{self.reports[-1]['step'] if step is None else step}"

    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps if "loss" in step]

    def trained_on(self) -> list[BatchRows]:
        return [batch for split, batch, _ in self.requests if split == "train"]


def difference(one: Adapter, other: Adapter) -> float:
    """The norm of what differs, relative to the norm of `other`."""
    assert one.keys() == other.keys()
    flat = [torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def settings_of(store: Store, model: Path, **changes: Any) -> Settings:
    """Settings of a small run on the CPU."""
    base = {
        "model_name_or_path": str(model),
        "quantization": "nf4",
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "lora_dropout": 0.0,
    }
    values = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": None,
        "data_path": store.folder,
        **changes,
    }
    return Settings.from_flags(base).replace(gradient_checkpointing=False, **values)


def values_of(store: Store, model: Path, **changes: Any) -> dict[str, Any]:
    """The same as values by flag name."""
    return settings_of(store, model, **changes).to_flags()
