"""What is due after each step of a trial."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from vlmtune.config.settings import Settings
from vlmtune.data.order import Order
from vlmtune.packed.trial_progress import TrialProgress
from vlmtune.training.best_evaluation import EvaluationRule
from vlmtune.training.trl_arguments import training_arguments

ORDER = Order(rows=11, per_device=2, accumulation=2, world_size=1, seed=0)  # three steps an epoch


def make_progress(folder: Path, state: TrainerState | None = None, **options: Any) -> TrialProgress:
    settings = Settings.from_flags({"use_cpu": True, **options})
    rule = EvaluationRule.of(settings, evaluation_rows=5)
    return TrialProgress(training_arguments(settings, str(folder), checkpointing=False), ORDER, rule, state)


def evaluations(progress: TrialProgress) -> list[tuple[int, int]]:
    """(step, number) of each evaluation until the trial ends."""
    seen = []
    while not progress.ended:
        progress.end_step()
        if progress.evaluation_due:
            seen.append((progress.step, progress.evaluation_number))
            progress.record_evaluation({"eval_loss": 1.0})
            assert not progress.evaluation_due
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_steps": 2, "max_steps": 4}, [(2, 1), (4, 2)]),
        ({"eval_steps": 2, "max_steps": 5}, [(2, 1), (4, 2), (5, 2)]),
        ({"eval_strategy": "epoch", "num_train_epochs": 2}, [(3, 1), (6, 2)]),
        ({"eval_strategy": "epoch", "max_steps": 5}, [(3, 1), (5, 2)]),
        ({"eval_strategy": "no", "eval_steps": 2, "max_steps": 4}, [(4, 2)]),
    ],
)
def test_evaluations_come_by_the_settings_and_at_the_end(
    options: dict[str, Any], expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    assert evaluations(make_progress(tmp_path, **options)) == expected


def test_the_steps_follow_from_epochs_or_are_given(tmp_path: Path) -> None:
    assert make_progress(tmp_path, num_train_epochs=1.5).max_steps == 5
    assert make_progress(tmp_path, num_train_epochs=1.5, max_steps=2).max_steps == 2


def test_an_epoch_counts_its_batches(tmp_path: Path) -> None:
    progress = make_progress(tmp_path, max_steps=4)
    epochs = []
    for _ in range(4):
        progress.end_step()
        epochs.append(progress.position()["epoch"])
    assert epochs == pytest.approx([2 / 6, 4 / 6, 1.0, 1 + 2 / 6])


def test_log_lines_are_due_once(tmp_path: Path) -> None:
    progress = make_progress(tmp_path, max_steps=4, logging_steps=2)
    due = []
    for _ in range(4):
        progress.end_step()
        due.append(progress.log_due)
        progress.clear_log_due()
        assert not progress.log_due
    assert due == [False, True, False, True]


def test_a_saved_state_is_continued(tmp_path: Path) -> None:
    whole = make_progress(tmp_path, eval_steps=2, max_steps=6)
    for _ in range(3):
        whole.end_step()
    whole.state.save_to_json(str(tmp_path / "state.json"))
    state = TrainerState.load_from_json(str(tmp_path / "state.json"))
    resumed = make_progress(tmp_path, state, eval_steps=2, max_steps=6)
    assert resumed.position() == whole.position()
    assert evaluations(resumed) == [(4, 2), (6, 3)]
