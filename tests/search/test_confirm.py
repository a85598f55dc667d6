"""The best trials of a search, trained again with other seeds by a function that trains nothing."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from search_kit import trial

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.confirm import Confirmed, confirm, read_confirm, runs_to_confirm
from vlmtune.search.search_progress import SearchProgress
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_results import PRUNED, TrialResult
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.training.meter import EVALUATION_NUMBER

pytestmark = pytest.mark.timeout(280)

SETTINGS = Settings.from_flags({"seed": 7})


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def made_runner() -> TrialRunner:
    """Its trials' loss is that of their rate, and worse the larger their seed; rate 2e-3 diverges."""

    class Trial(tune.Trainable):
        def step(self) -> dict[str, Any]:
            values = self.config["point"]
            rate, later = values["learning_rate"], values["seed"] - 7
            loss = math.nan if rate == 2e-3 else rate * 100 + 0.1 * later * (rate > 1e-3)
            return {"eval_loss": loss, "step": 8, "max_steps": 8, EVALUATION_NUMBER: 1, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}

        def load_checkpoint(self, checkpoint: Any) -> None: ...

    return TrialRunner("packed", Trial, max_concurrent_trials=1, description="", reuse_actors=True)


def trials(count: int = 12) -> list[TrialResult]:
    rates = [1e-3, 1.1e-3, 2e-3, *(3e-3 + number * 1e-3 for number in range(count - 3))]
    losses = [0.2, 0.1, 0.05, *([0.9] * (count - 3))]
    made = [
        trial(number, rate, eval_loss=loss)
        for number, (rate, loss) in enumerate(zip(rates, losses, strict=True))
    ]
    return [*made[:-1], trial(count - 1, 9e-3, PRUNED, eval_loss=0.01)]


def test_the_winner_is_the_one_with_the_best_mean_of_those_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    known = trials()
    again = runs_to_confirm(SETTINGS, len(known))
    console = TrialConsole(["learning_rate", "seed"], "eval_loss", "min", SearchProgress(again), "CPU")
    with caplog.at_level("INFO", logger="vlmtune"):
        confirmed = confirm(SETTINGS, made_runner(), str(tmp_path), known, console)
    assert confirmed is not None
    assert "6/6 trials" in capsys.readouterr().out, "so long a part of a search is not silent"
    assert set(confirmed.values) == {"t0", "t1", "t2"}, "the best three that ran to their end"
    assert confirmed.values["t0"] == pytest.approx([0.2, 0.1, 0.1])
    assert confirmed.values["t1"] == pytest.approx([0.1, 0.21, 0.31])
    assert [math.isnan(value) for value in confirmed.values["t2"]] == [False, True, True]
    assert confirmed.best(known) is known[0], "the one that looked best diverges with other seeds"
    assert confirmed.spread(known[0]) == pytest.approx(0.0577, abs=1e-3)
    resumed = confirm(SETTINGS, made_runner(), str(tmp_path), known)
    assert resumed is not None
    assert resumed.values["t1"] == confirmed.values["t1"], "it resumes"


def test_what_lies_within_the_spread_is_said() -> None:
    one = trial(0, 1e-3)
    found = Confirmed({"t0": [0.3, 0.2, 0.4]}, "min")
    assert found.text(one, {"baseline": 0.5, "recipe": 0.39}) == (
        "0.3 ± 0.1 over 3 seeds; the difference to the recipe is within it"
    )
    assert found.text(one, {"baseline": 0.5}) == "0.3 ± 0.1 over 3 seeds"
    highest = Confirmed({"t0": [0.3, 0.2, 0.4]}, "max")
    assert "the baseline is within it" in highest.text(one, {"baseline": 0.25, "recipe": 0.1})


def test_it_is_left_out_where_it_is_off_or_not_worth_it(tmp_path: Path) -> None:
    runner = TrialRunner("packed", None, max_concurrent_trials=1, description="")
    assert confirm(SETTINGS, runner, str(tmp_path), trials(11)) is None
    for changes in ({"confirm": None}, {"time_budget_s": 10.0}, {"confirm": "1x2"}):
        assert confirm(SETTINGS.replace(**changes), runner, str(tmp_path), trials()) is None


@pytest.mark.parametrize("text", ["3", "3x0", "x2", "3 x 2", "-1x2"])
def test_a_wrong_value_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--confirm .*must be TRIALSxSEEDS"):
        read_confirm(SETTINGS.replace(confirm=text))
