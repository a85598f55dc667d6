"""What tests of packed training share: an engine run to its end in this process, and what it left behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_kit import Adapter, Run, difference, values_of

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import ANSWER, TEMPLATE, EncodedExample
from vlmtune.data.store import Store
from vlmtune.packed.checkpoint_folder import fetch_last_checkpoint
from vlmtune.packed.engine import Engine
from vlmtune.packed.messages import TrialReport
from vlmtune.packed.packed_batch import PackedRow

CLOSE = 1e-5  # relative norm of what two adapters differ by
# Ranks, factors, schedules, batch sizes, lengths, accumulation and losses that differ, of runs of different
# length.
TRIALS: dict[str, dict[str, Any]] = {
    "one": {
        "lora_r": 1,
        "lora_alpha": 2,
        "train_sampling_strategy": "group_by_length",
        "max_steps": 6,
    },
    "three": {
        "lora_r": 3,
        "lora_alpha": 8,
        "per_device_train_batch_size": 1,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_steps": 8,
    },
    "eight": {
        "lora_r": 8,
        "lora_alpha": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "max_length": 56,
        "num_train_epochs": 2,
        "loss_type": "dft",
        "max_steps": 4,
    },
    "large": {
        "lora_r": 64,
        "lora_alpha": 64,
        "use_rslora": True,
        "max_grad_norm": 0.1,
        "optim": "sgd",
        "max_steps": 3,
    },
}


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
                on_log=self.steps[name].append,
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
    values: dict[str, Any], store: Store, folder: Path, *, trials: int = 4, max_lora_rank: int = 8
) -> Packed:
    """An engine for `values` whose trials' checkpoints go below `folder`."""
    reports: dict[str, list[TrialReport]] = {}
    notes: list[str] = []

    def deliver(name: str, report: TrialReport) -> None:
        reports.setdefault(name, []).append(report)

    return Packed(
        Engine(
            Settings.from_flags(values),
            store,
            trials=trials,
            max_lora_rank=max_lora_rank,
            deliver=deliver,
            note=notes.append,
        ),
        folder,
        reports,
        {},
        notes,
    )


def pack(store: Store, model: Path, folder: Path, trials: dict[str, dict[str, Any]], **shared: Any) -> Packed:
    packed = make_engine(values_of(store, model, **shared), store, folder)
    for name, trial in trials.items():
        packed.join(name, values_of(store, model, **shared, **trial))
    return packed


def assert_as_alone(packed: Packed, name: str, alone: Run, close: float = CLOSE) -> None:
    """Curve, reports and adapter of a packed trial are those of the run alone."""
    assert difference(packed.adapter(name), alone.adapter()) < close
    assert packed.losses(name) == pytest.approx(alone.losses(), rel=1e-4)
    found, expected = [report.metrics for report in packed.reports[name]], alone.reports
    assert [report["step"] for report in found] == [report["step"] for report in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
        assert mine["epoch"] == theirs["epoch"]
        assert mine.keys() - theirs.keys() == {"checkpoint_path", "evaluation"}
        assert theirs.keys() <= mine.keys()
    compared = ("learning_rate", "grad_norm", "mean_token_accuracy", "epoch")
    curves = [
        [{key: step[key] for key in compared} for step in steps if "loss" in step]
        for steps in (packed.steps[name], alone.steps)
    ]
    for step, expected_step in zip(*curves, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-3)


def row_of(
    slot: Any, tokens: int, *, image: bool = False, answers: int = 1, adapter: Tensor | None = None
) -> PackedRow:
    """A row of some tokens, of which the last `answers` are labelled."""
    kinds = np.full(tokens, TEMPLATE, dtype=np.uint8)
    kinds[-answers:] = ANSWER
    tensors = {"pixel_values": np.zeros((1, 3, 4, 4), dtype=np.float32)} if image else {}
    example = EncodedExample(np.arange(tokens, dtype=np.int32) + 10, kinds, tensors)
    return PackedRow(slot, 0, example, torch.zeros(1) if adapter is None else adapter, 1.0)
