"""Sums over the rows of a step, and the log lines that come of them."""

import math

import pytest
import torch

from vlmtune.packed.step_totals import LossLog, StepTotals
from vlmtune.packed.worker_shard import SINGLE_WORKER

CPU = torch.device("cpu")


def make_totals(losses: list[list[float]], correct: list[list[int]], labelled_tokens: int) -> StepTotals:
    totals = StepTotals(labelled_tokens, CPU)
    for part, right in zip(losses, correct, strict=True):
        totals.add(torch.tensor(part), torch.tensor(right))
    return totals


def test_batches_add_up_to_the_mean_over_the_labelled_tokens_of_the_step() -> None:
    totals = make_totals([[6.0, 2.0], [4.0]], [[1, 2], [0]], labelled_tokens=8)
    assert totals.weight == 1 / 8
    assert totals.loss.item() == pytest.approx(12 / 8)
    assert totals.correct.item() == 3


def test_a_single_worker_keeps_its_gradient_and_totals() -> None:
    totals, gradient = make_totals([[6.0]], [[1]], labelled_tokens=3), torch.tensor([1.0, 2.0])
    labelled_tokens = totals.all_reduce(SINGLE_WORKER, gradient, reduce_has_images=True)
    assert labelled_tokens.item() == 3
    assert gradient.tolist() == [1.0, 2.0]
    assert not totals.has_images
    assert totals.loss.item() == 2


def test_a_step_without_labels_has_no_loss() -> None:
    totals = make_totals([[0.0]], [[0]], labelled_tokens=0)
    assert (totals.weight, totals.loss.item()) == (1.0, 0.0)


def log_of(steps: list[tuple[float, int, float, int]]) -> LossLog:
    """Steps as (loss, correct, gradient norm, labelled tokens)."""
    log = LossLog()
    for loss, correct, norm, labelled_tokens in steps:
        totals = make_totals([[loss * labelled_tokens]], [[correct]], labelled_tokens)
        log.add(totals, torch.tensor(norm), torch.tensor(float(labelled_tokens), dtype=torch.float64))
    return log


def test_a_line_has_the_mean_loss_the_last_norm_and_the_accuracy_of_all_tokens() -> None:
    log = log_of([(2.0, 1, 0.5, 2), (1.0, 6, 0.25, 6)])
    assert log.read_line() is None
    log.close_line(learning_rate=1e-3, epoch=0.5, step=2)
    line = log.read_line()
    assert line is not None
    assert line.values == pytest.approx(
        {
            "loss": 1.5,
            "grad_norm": 0.25,
            "learning_rate": 1e-3,
            "epoch": 0.5,
            "mean_token_accuracy": 7 / 8,
        }
    )
    assert (line.step, line.finite) == (2, True)
    assert log.read_line() is None, "it is read once"


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_loss_or_norm_that_is_not_finite_is_noticed_in_any_step_of_the_line(
    number: float, place: int
) -> None:
    bad = (number, 1, 0.5, 2) if place == 0 else (1.0, 1, number, 2)
    log = log_of([(1.0, 1, 0.5, 2), bad, (1.0, 1, 0.5, 2)])
    log.close_line(learning_rate=1e-3, epoch=0.5, step=3)
    line = log.read_line()
    assert line is not None
    assert not line.finite
