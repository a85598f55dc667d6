"""What answers rows: one base, and adapters beside each other on it."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from vlmtune.cluster import READ_TASKS, connect
from vlmtune.config.settings import Settings
from vlmtune.data.cache import prepare_store
from vlmtune.data.source import DataSource
from vlmtune.evaluation.actors import BASE, AnswerJob, answer_rows
from vlmtune.evaluation.adapter import answering_as, load_model
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.model.base import load_base
from vlmtune.model.lora import attach, lora_config, save_adapter
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef

CPU = torch.device("cpu")


def files_of(
    models: Path, folder: Path, *, rank: int, targets: list[str], **options: Any
) -> dict[str, bytes]:
    """An adapter with random values, as the files of its folder."""
    base = load_base(ModelRef(str(models / "llava")), quantization="nf4", dtype="float32", device=CPU)
    names = target_modules(base, targets, lora_vision=False)
    model = attach(
        base, lora_config(base, r=rank, alpha=16, dropout=0.0, target_modules=names, **options), seed=rank
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(rank))
    save_adapter(model, folder)
    return {path.name: path.read_bytes() for path in folder.glob("adapter_*")}


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_beside_each_other_answer_as_each_alone(
    models: Path, tmp_path: Path, use_dora: bool
) -> None:
    adapters = {
        "best": files_of(models, tmp_path / "best", rank=8, targets=["q_proj", "v_proj"], use_dora=use_dora),
        "own": files_of(models, tmp_path / "own", rank=2, targets=["k_proj", "v_proj", "down_proj"]),
    }
    settings = Settings.from_flags(
        {"model_name_or_path": str(models / "llava"), "quantization": "nf4", "dtype": "float32"}
    )
    tokens = torch.arange(5, 21)[None]

    def logits(model: Any, name: str) -> torch.Tensor:
        with torch.no_grad(), answering_as(model, name):
            found: torch.Tensor = model(input_ids=tokens).logits
        return found

    alone = {name: logits(load_model(settings, {name: files}, CPU), name) for name, files in adapters.items()}
    alone["base"] = logits(load_model(settings, {}, CPU), "base")
    both = load_model(settings, adapters, CPU)
    for name in ("best", "base", "own", "best", "own", "base"):
        assert torch.equal(logits(both, name), alone[name]), name
    assert len({tuple(found.flatten().tolist()) for found in alone.values()}) == 3


@pytest.mark.timeout(120)
def test_few_processes_read(
    models: Path, mall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them would start, for seconds and with half a gigabyte each, before the model that they read
    for."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = connect()
    try:
        store = prepare_store(DataSource(str(mall), ModelRef(str(models / "llava"))), str(tmp_path / "cache"))
        settings = Settings.from_flags(
            {"model_name_or_path": str(models / "llava"), "dtype": "float32", "use_cpu": True}
        )
        items = [{"number": number} for number in range(16)]

        def read(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
            time.sleep(0.5)  # another one would start beside it
            yield {"row": pickle.dumps((int(item["number"]), os.getpid())), "example": pickle.dumps(None)}

        job = AnswerJob(settings, {}, (BASE,), BatchBuilder.of(store), 4, likelihoods=False)
        found = list(answer_rows(job, items, read, cluster))
    finally:
        ray.shutdown()
    assert [number for (number, _), _ in found] == list(range(16))
    assert len({pid for (_, pid), _ in found}) <= READ_TASKS
