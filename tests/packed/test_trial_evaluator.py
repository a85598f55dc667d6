"""Evaluation of trials together."""

from collections.abc import Callable
from pathlib import Path

import pytest
from packed_kit import assert_as_alone, pack
from training_kit import Run

from vlmtune.data.store import Store
from vlmtune.evaluation.metrics import METRICS

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
