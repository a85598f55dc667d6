"""Which evaluation of a run counts, and when its patience is over."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_kit import Run, settings_of
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.training.best_evaluation import BEST_STEP, OUT_OF_PATIENCE, EvaluationRule, ran_to_its_end
from vlmtune.training.launch import run_in_process

ROWS = 40


def rule(**flags: Any) -> EvaluationRule:
    return EvaluationRule.of(Settings.from_flags({"load_best_model_at_end": True, **flags}), ROWS)


def history(*losses: float) -> list[dict[str, float]]:
    logged = [
        [{"loss": 9.0, "step": 2 * number}, {"eval_loss": loss, "step": 2 * number}]
        for number, loss in enumerate(losses, 1)
    ]
    return [entry for pair in logged for entry in pair]


def judged(rule: EvaluationRule, *losses: float) -> dict[str, Any]:
    report = {"eval_loss": losses[-1], "step": 2 * len(losses), "max_steps": 8}
    return rule.judged(report, ["eval_loss"], history(*losses))


def test_a_report_has_the_best_evaluation_so_far_and_its_own_beside_it() -> None:
    assert judged(rule(), 2.0, 1.2, 1.6) == {
        "eval_loss": 1.2,
        "last_eval_loss": 1.6,
        BEST_STEP: 4,
        "step": 6,
        "max_steps": 8,
    }
    assert judged(rule(), 1.2, 1.2)[BEST_STEP] == 4, "the last of equal ones"
    assert judged(rule(), math.nan, 1.5, 1.7)["eval_loss"] == 1.5


def test_a_diverged_evaluation_and_a_run_whose_last_one_counts_stay_as_they_are() -> None:
    diverged = judged(rule(), 1.2, math.nan)
    assert math.isnan(diverged["eval_loss"]) and math.isnan(diverged["last_eval_loss"])
    assert BEST_STEP not in diverged
    assert judged(rule(load_best_model_at_end=False), 1.2, 1.6) == {
        "eval_loss": 1.6,
        "step": 4,
        "max_steps": 8,
    }


def test_a_metric_that_is_measured_on_a_sample_is_not_compared() -> None:
    answers = {"metric": "exact_match", "mode": "max"}
    whole, sampled = rule(**answers, metric_rows=ROWS), rule(**answers, metric_rows=ROWS - 1)
    assert (whole.metric, whole.mode, whole.load_best) == ("exact_match", "max", True)
    assert not sampled.load_best
    seconds = rule(metric="seconds")
    assert (seconds.metric, seconds.mode, seconds.load_best) == ("eval_loss", "min", True)


@pytest.mark.parametrize("threshold", [0.0, 0.15])
@pytest.mark.parametrize("losses", [(3.0, 2.0, 1.9, 1.8, 1.7, 2.0, 2.1), (1.0, 1.0, 0.9, 0.5, 0.45)])
def test_patience_is_counted_as_transformers_counts_it(
    threshold: float, losses: tuple[float, ...], tmp_path: Path
) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_loss", greater_is_better=False
    )
    theirs, state, control = EarlyStoppingCallback(2, threshold), TrainerState(), TrainerControl()
    mine = rule(early_stopping_patience=2, early_stopping_threshold=threshold)
    for number, loss in enumerate(losses, 1):
        theirs.on_evaluate(args, state, control, {"eval_loss": loss})
        state.best_metric = loss if state.best_metric is None else min(loss, state.best_metric)
        assert mine.out_of_patience(history(*losses[:number])) == control.should_training_stop
        if control.should_training_stop:
            return


def test_patience_watches_the_loss_at_evaluations() -> None:
    with pytest.raises(ConfigError, match="watches eval_loss, but metric is exact_match"):
        rule(early_stopping_patience=1, metric="exact_match", mode="max")
    with pytest.raises(ConfigError, match="needs evaluations"):
        rule(early_stopping_patience=1, eval_strategy="no")


def test_a_run_keeps_its_best_and_its_last_adapter_and_ends_when_its_patience_is_over(
    run_loop: Callable[..., Run], stores: dict[str, Store], models: Path, tmp_path: Path
) -> None:
    # The rate is so high that the loss rises once.
    flags = {"learning_rate": 0.02, "max_steps": 16, "eval_steps": 2, "lora_r": 8}
    plain = run_loop("mall llava", **flags)
    losses = [report["eval_loss"] for report in plain.reports]
    settings = settings_of(
        stores["mall llava"],
        models / "llava",
        **flags,
        load_best_model_at_end=True,
        early_stopping_patience=1,
    )
    outcome = run_in_process(settings, stores["mall llava"], str(tmp_path))
    waited = next(number for number in range(1, len(losses)) if losses[number] >= min(losses[:number]))
    assert waited < len(losses) - 1, losses
    kept = losses.index(min(losses[: waited + 1]))
    assert outcome.metrics["step"] == 2 * (waited + 1)
    assert outcome.metrics[OUT_OF_PATIENCE] and ran_to_its_end(outcome.metrics)
    assert outcome.metrics["eval_loss"] == pytest.approx(losses[kept])
    assert outcome.metrics["last_eval_loss"] == pytest.approx(losses[waited])
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert {f"checkpoint-{2 * (kept + 1)}", f"checkpoint-{2 * (waited + 1)}"} <= set(folders)
    assert outcome.checkpoint.endswith(f"checkpoint-{2 * (kept + 1)}")
    assert str(outcome.last_checkpoint).endswith(f"checkpoint-{2 * (waited + 1)}")
    again = run_in_process(settings, stores["mall llava"], str(tmp_path))
    assert again == outcome, "a run that has ended by its patience makes no further step"
