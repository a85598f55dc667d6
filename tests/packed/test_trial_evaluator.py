"""Evaluation of trials together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import assert_as_alone, pack
from training_kit import Run, values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.evaluation.metrics import METRICS
from vlmtune.evaluation.objective import Objective
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef

RunLoop = Callable[..., Run]

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize("metric", ["token_f1", "mae"])
def test_a_metric_of_answers_is_the_same_in_both_runners(
    metric: str, run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    """On some evaluation rows at first, on all at the end."""
    shared = {"metric": metric, "mode": METRICS[metric].mode, "metric_rows": 2, "max_new_tokens": 4}
    trial = {"lora_r": 8, "lora_alpha": 32, "learning_rate": 1e-2, "max_steps": 8, "eval_steps": 4}
    alone = run_loop("mall llava", **shared, **trial)
    packed = pack(
        stores["mall llava"],
        models / "llava",
        tmp_path,
        {"mine": trial, "other": {**trial, "lora_r": 4}},
        **shared,
    )
    packed.run()
    packed.close()
    expected = [report[metric] for report in alone.reports]
    assert len(expected) == 2
    assert [report.metrics[metric] for report in packed.reports["mine"]] == pytest.approx(expected)
    assert_as_alone(packed, "mine", alone)


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
