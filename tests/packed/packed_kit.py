"""What tests of packed training share: an engine run to its end in this process, and what it left behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from training_kit import Adapter

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.packed.checkpoint_folder import fetch_last_checkpoint
from vlmtune.packed.engine import Engine
from vlmtune.packed.messages import TrialReport


@dataclass
class Packed:
    """An engine with its trials' reports and logged steps by trial id."""

    engine: Engine
    folder: Path
    reports: dict[str, list[TrialReport]] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def join(self, name: str, values: dict[str, Any]) -> None:
        self.steps.setdefault(name, [])
        folder = f"{self.folder}/{name}"
        with fetch_last_checkpoint(folder) as checkpoint:
            slot = self.engine.slot_factory.make(
                name,
                Settings.from_flags(values),
                folder=folder,
                checkpoint=checkpoint,
                progress=self.steps[name].append,
            )
        self.engine.join(slot)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while not until() and self.engine.train_round():
            pass

    def close(self) -> None:
        self.engine.close()

    def adapter(self, name: str) -> Adapter:
        return load_file(f"{self.reports[name][-1].metrics['checkpoint_path']}/adapter_model.safetensors")

    def losses(self, name: str) -> list[float]:
        return [step["loss"] for step in self.steps[name] if "loss" in step]


def make_engine(
    values: dict[str, Any], store: Store, folder: Path, *, trials: int = 4, rank: int = 8
) -> Packed:
    """An engine for `values` whose trials' checkpoints go below `folder`."""
    reports: dict[str, list[TrialReport]] = {}
    notes: list[str] = []

    def deliver(name: str, report: TrialReport) -> None:
        reports.setdefault(name, []).append(report)

    return Packed(
        Engine(
            Settings.from_flags(values), store, trials=trials, rank=rank, deliver=deliver, note=notes.append
        ),
        folder,
        reports,
        {},
        notes,
    )
