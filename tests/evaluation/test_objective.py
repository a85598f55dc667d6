"""The metric of answers that a search optimizes, during training and at its end."""

from pathlib import Path
from typing import Any

import torch
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.evaluation.objective import Objective
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef


def test_an_objective_answers_a_fixed_sample_before_the_end(stores: dict[str, Store], models: Path):
    store, reads = stores["mall llava"], []
    settings = Settings.from_flags(
        values_of(store, models / "llava", metric="exact_match", mode="max", metric_rows=3, max_new_tokens=2)
    )
    objective = Objective.of(settings)
    assert objective is not None
    assert Objective.of(settings.replace(metric="eval_loss", mode="min")) is None
    base = load_base(
        ModelRef(str(models / "llava")), quantization="none", dtype=None, device=torch.device("cpu")
    )
    processor = ModelRef(str(models / "llava")).processor()

    def read(store: Store, rows: Any) -> Any:
        reads.append(list(rows))
        return store.read(rows)

    for last in (False, False, True):
        objective.measure(base, processor, store, read, last=last)
    sizes = [sum(map(len, reads[:2])), sum(map(len, reads[2:4]))]
    assert sizes == [6, 6], "three rows are answered, and read again for their references"
    assert reads[1] == reads[3], "the same ones each time"
    assert set(reads[-1]) == set(store.rows_of("eval").tolist())
