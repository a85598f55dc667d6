"""Evaluation of trials together."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_kit import Packed, assert_as_alone, pack
from training_kit import Run

from vlmtune.data.store import Store
from vlmtune.evaluation.metrics import METRICS
from vlmtune.training.best_evaluation import LIVE_ANSWERS

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


def test_live_answers_change_no_result(
    stores: dict[str, Store], models: Path, tmp_path: Path, one_thread: None
):
    """To the last bit, with dropout: they use no random numbers."""
    trial = {"lora_r": 8, "lora_dropout": 0.1, "learning_rate": 1e-2, "max_steps": 6, "eval_steps": 2}
    trials = {"mine": trial, "other": {**trial, "lora_r": 4}}
    store, search = stores["mall llava"], {"lora_r": {"choice": [4, 8]}}

    def run(rows: int) -> Packed:
        shared = {"search_space": search, "live_answers": rows, "max_new_tokens": 4}
        packed = pack(store, models / "llava", tmp_path / str(rows), trials, **shared)
        if packed.engine.evaluator.live is not None:
            packed.engine.evaluator.live.started -= 1e4  # as if training had taken hours
        packed.run()
        packed.close()
        return packed

    without, with_answers = run(0), run(2)
    for name in trials:
        found = [report.metrics for report in with_answers.reports[name]]
        answered = [metrics.pop(LIVE_ANSWERS) for metrics in found]
        assert [len(rows) for rows in answered] == [2, 2, 2]
        expected = [report.metrics for report in without.reports[name]]
        assert [metrics["eval_loss"] for metrics in found] == [one["eval_loss"] for one in expected]
        assert [metrics.keys() for metrics in found] == [metrics.keys() for metrics in expected]
        assert with_answers.losses(name) == without.losses(name)
        assert all(
            torch.equal(one, without.adapter(name)[key]) for key, one in with_answers.adapter(name).items()
        )


def test_answers_that_are_scored_are_shown_and_not_generated_again(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    shared = {"metric": "token_f1", "mode": "max", "metric_rows": 3, "max_new_tokens": 4}
    search = {"search_space": {"lora_r": {"choice": [4, 8]}}, "live_answers": 3}
    trials = {"mine": {"max_steps": 2, "eval_steps": 1}}
    packed = pack(stores["mall llava"], models / "llava", tmp_path, trials, **shared, **search)
    packed.run()
    packed.close()
    answered = [report.metrics[LIVE_ANSWERS] for report in packed.reports["mine"]]
    assert [len(rows) for rows in answered] == [3, 3]
    assert [[row["question"] for row in rows] for rows in answered[:1]] == [
        [row["question"] for row in rows] for rows in answered[1:]
    ]
    assert packed.engine.evaluator.live is not None and packed.engine.evaluator.live.seconds == 0
