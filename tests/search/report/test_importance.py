"""The importance of options, on made-up trials of which one option decides."""

from dataclasses import replace

import pytest
from search_kit import trial

from vlmtune.search.report.importance import ENOUGH_TRIALS, importances


def test_importance_finds_what_decides_and_is_silent_on_few_trials() -> None:
    rates = [1e-3 * 1.5**number for number in range(12)]
    many = [trial(number, rate) for number, rate in enumerate(rates)]
    found = importances(many, {}, ["lora_r", "learning_rate"], "eval_loss", "min")
    assert found is not None
    shares, of = found
    assert next(iter(shares)) == "learning_rate" and sum(shares.values()) == pytest.approx(1)
    assert of == "eval_loss at the end, 12 trials"
    assert importances(many[: ENOUGH_TRIALS - 1], {}, ["learning_rate"], "eval_loss", "min") is None
    same = [replace(row, values={"lora_r": 4}) for row in many]
    assert importances(same, {}, ["lora_r"], "eval_loss", "min") is None, "nothing varied"
