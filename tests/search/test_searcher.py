import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from vlmtune.config.settings import Settings
from vlmtune.search.first_points import BASELINE as FROM_BASELINE
from vlmtune.search.first_points import EARLIER, RECIPE, REQUESTED, SPREAD, STARTUP_TRIALS, TPE
from vlmtune.search.isolated_trial import trial_values
from vlmtune.search.requests import UserRequests
from vlmtune.search.searcher import CONSTRAINT, TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.warm_start import EarlierTrials
from vlmtune.training.meter import EVALUATION_NUMBER

BASELINE = Settings.from_flags({"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4, "recipe": None})
SPACE = {
    "lora_r": {"choice": [4, 8, 64]},
    "lora_alpha": {"expr": "2 * lora_r"},
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
}
MOST_STEPS = 12


def search(seed: int = 0, mode: str = "min") -> TrialSearcher:
    return TrialSearcher(Space.parse(SPACE, BASELINE), metric="eval_loss", mode=mode, seed=seed)


def report(loss: float, evaluation: int, step: int) -> dict[str, Any]:
    # Tune's own count differs where an interrupted trial was resumed.
    return {
        "eval_loss": loss,
        EVALUATION_NUMBER: evaluation,
        "training_iteration": 1,
        "step": step,
        "max_steps": MOST_STEPS,
    }


def loss_of(values: dict[str, Any]) -> float:
    return abs(math.log10(values["learning_rate"]) + 3.0) + values["lora_r"] / 100


def propose(searcher: TrialSearcher, trial_id: str) -> dict[str, Any]:
    return trial_values(searcher.suggest(trial_id))


def trial_of(searcher: TrialSearcher, trial_id: str) -> optuna.trial.FrozenTrial:
    return searcher._ot_study.trials[searcher._ot_trials[trial_id].number]


def run(searcher: TrialSearcher, first: int, last: int) -> list[dict[str, Any]]:
    """The values of trials first … last - 1, run one at a time to their end."""
    drawn = []
    for number in range(first, last):
        values = propose(searcher, str(number))
        drawn.append(values)
        searcher.on_trial_complete(str(number), result=report(loss_of(values), 4, MOST_STEPS))
    return drawn


def test_the_first_trial_is_the_baseline() -> None:
    assert propose(search(), "a") == {"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4}


def test_a_trial_that_ended_is_complete_and_a_stopped_one_pruned_with_what_it_reported() -> None:
    searcher = search()
    for trial_id in ("ended", "stopped"):
        searcher.suggest(trial_id)
        searcher.on_trial_result(trial_id, report(3.0, 1, 3))
    searcher.on_trial_complete("ended", result=report(2.0, 4, MOST_STEPS))
    searcher.on_trial_complete("stopped", result=report(2.5, 3, 9))
    ended, stopped = trial_of(searcher, "ended"), trial_of(searcher, "stopped")
    assert (ended.state, ended.value) == (TrialState.COMPLETE, 2.0)
    assert stopped.state is TrialState.PRUNED
    assert stopped.intermediate_values == {1: 3.0, 3: 2.5}
    assert stopped.constraints == ended.constraints == {CONSTRAINT: 0.0}


def test_one_that_was_stopped_before_its_first_report_is_pruned_and_an_error_fails() -> None:
    searcher = search()
    for trial_id in ("stopped", "failed"):
        searcher.suggest(trial_id)
    searcher.on_trial_complete("stopped")
    searcher.on_trial_complete("failed", error=True)
    assert trial_of(searcher, "stopped").state is TrialState.PRUNED
    assert trial_of(searcher, "failed").state is TrialState.FAIL


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [3, MOST_STEPS])
def test_a_trial_that_diverged_is_pruned(value: float, step: int) -> None:
    searcher = search()
    searcher.suggest("a")
    searcher.on_trial_complete("a", result=report(value, 1, step))
    assert trial_of(searcher, "a").state is TrialState.PRUNED


def test_a_failed_trial_that_runs_again_leaves_its_first_answer() -> None:
    searcher = search()
    searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_result("a", report(1.0, 1, 3))
    searcher.on_trial_complete("a", result=report(1.0, 4, MOST_STEPS))
    assert trial_of(searcher, "a").state is TrialState.FAIL
    assert len(searcher._ot_study.trials) == 1


def proposals_that_do_not_fit(*, tell_infeasible: bool, mode: str = "min") -> int:
    """How many of 40 trials, after 20 others, have the rank that does not fit but would be the best.

    Args:
        tell_infeasible: tell Optuna of such trials as INFEASIBLE; else as FAIL.
    """
    searcher = search(seed=1, mode=mode)
    found = 0
    for number in range(60):
        values = propose(searcher, str(number))
        if values["lora_r"] == 64:
            found += number >= 20
            result = {
                "eval_loss": math.nan,
                "infeasible": True,
                EVALUATION_NUMBER: 0,
                "training_iteration": 1,
            }
            if tell_infeasible:
                searcher.on_trial_result(str(number), result)
            searcher.on_trial_complete(
                str(number), result=result if tell_infeasible else None, error=not tell_infeasible
            )
        else:
            loss = -values["lora_r"] if mode == "min" else values["lora_r"]
            searcher.on_trial_complete(str(number), result=report(float(loss), 4, MOST_STEPS))
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_region_of_infeasible_trials_is_avoided(mode: str) -> None:
    infeasible, failed = (
        proposals_that_do_not_fit(tell_infeasible=True, mode=mode),
        proposals_that_do_not_fit(tell_infeasible=False, mode=mode),
    )
    assert infeasible < failed
    assert infeasible <= 10


def test_infeasible_trials_are_pruned_with_the_constraint_and_no_value() -> None:
    searcher = search(mode="max")
    searcher.suggest("a")
    result = {"eval_loss": math.nan, "infeasible": True, EVALUATION_NUMBER: 0, "training_iteration": 1}
    searcher.on_trial_result("a", result)
    searcher.on_trial_complete("a", result=result)
    trial = trial_of(searcher, "a")
    assert trial.state is TrialState.PRUNED
    assert trial.constraints[CONSTRAINT] > 0
    assert trial.intermediate_values == {}


def test_a_seed_gives_the_same_trials() -> None:
    assert run(search(seed=3), 0, 15) == run(search(seed=3), 0, 15)
    assert run(search(seed=3), 0, 5) != run(search(seed=4), 0, 5)


def test_a_restored_study_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    whole = run(search(), 0, 16)
    first = search()
    begun = run(first, 0, 12)
    first.suggest("open")
    first.on_trial_complete("open", error=True)
    first.save(str(tmp_path / "state.pkl"))
    second = search(seed=9)
    second.restore(str(tmp_path / "state.pkl"))
    assert begun == whole[:12]
    assert [trial.state for trial in second._ot_study.trials] == [TrialState.COMPLETE] * 12 + [
        TrialState.FAIL
    ]
    assert run(second, 13, 16) == run(first, 13, 16)


def test_with_several_objectives_the_study_has_them_all_and_a_stopped_trial_has_no_values() -> None:
    searcher = TrialSearcher(
        Space.parse(SPACE, BASELINE),
        metric="eval_loss",
        mode="min",
        seed=0,
        more_metrics={"rows_per_second": "max"},
    )
    for trial_id in ("ended", "stopped", "diverged", "no memory"):
        searcher.suggest(trial_id)
        searcher.on_trial_result(trial_id, {**report(3.0, 1, 3), "rows_per_second": 5.0})
    searcher.on_trial_complete("ended", result={**report(2.0, 4, MOST_STEPS), "rows_per_second": 6.0})
    searcher.on_trial_complete("stopped", result={**report(2.5, 2, 6), "rows_per_second": 6.0})
    searcher.on_trial_complete("diverged", result={**report(math.nan, 4, MOST_STEPS), "rows_per_second": 6.0})
    searcher.on_trial_complete(
        "no memory", result={"eval_loss": math.nan, "infeasible": True, EVALUATION_NUMBER: 0}
    )
    assert [direction.name for direction in searcher._ot_study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert trial_of(searcher, "ended").values == [2.0, 6.0]
    for trial_id in ("stopped", "diverged", "no memory"):
        assert trial_of(searcher, trial_id).state == TrialState.PRUNED
        assert trial_of(searcher, trial_id).values is None
    for number in range(12):  # past the start-up trials, so that TPE sorts all of them
        propose(searcher, str(number))
        searcher.on_trial_complete(
            str(number), result={**report(float(number), 4, MOST_STEPS), "rows_per_second": 1.0 * number}
        )
    assert len(searcher._ot_study.best_trials) > 1


def origins(searcher: TrialSearcher) -> list[str]:
    return list(searcher.origins.values())


def test_the_first_proposals_are_baseline_recipe_and_points_spread_around_the_usual_rate() -> None:
    settings = BASELINE.replace(recipe={"learning_rate": 2e-4, "lora_r": 8, "lora_alpha": 16})
    searcher = TrialSearcher(
        Space.parse(SPACE, settings), metric="eval_loss", mode="min", seed=0, width=4096, n_startup_trials=4
    )
    values = [propose(searcher, str(number)) for number in range(12)]
    assert values[1] == {"lora_r": 8, "lora_alpha": 16, "learning_rate": 2e-4}
    assert origins(searcher) == [FROM_BASELINE, RECIPE] + 10 * [SPREAD], "nothing has ended"
    rates = sorted(one["learning_rate"] for one in values[2:])
    usual = 5e-4 * (2000 / 4096) ** 0.781
    assert sum(usual / 4 < rate < 4 * usual for rate in rates) >= 6
    for number in range(4):
        searcher.on_trial_complete(str(number), result=report(1.0, 4, MOST_STEPS))
    later = propose(searcher, "later")
    assert origins(searcher)[-1] == TPE
    assert propose(searcher, "later") == later, "asked again, the same"


def test_points_of_earlier_searches_come_before_the_spread_ones() -> None:
    space = Space.parse(SPACE, BASELINE.replace(recipe=None))
    earlier = EarlierTrials(points=[{"lora_r": 4, "learning_rate": 3e-3}])
    searcher = TrialSearcher(space, metric="eval_loss", mode="min", seed=0, earlier=earlier)
    values = [propose(searcher, str(number)) for number in range(3)]
    assert origins(searcher) == [FROM_BASELINE, EARLIER, SPREAD]
    assert values[1] == {"lora_r": 4, "lora_alpha": 8, "learning_rate": 3e-3}


def test_a_recipe_that_the_space_does_not_have_runs_beside_the_search() -> None:
    # The recipe adapts all linear layers.
    settings = BASELINE.replace(num_samples=8, recipe=Settings().search.recipe)
    searcher = TrialSearcher(Space.parse(SPACE, settings), metric="eval_loss", mode="min", seed=0)
    first, second, third = (propose(searcher, name) for name in ("a", "b", "c"))
    assert first["learning_rate"] == 1e-4
    recipe = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4}
    assert second == {**recipe, "lora_target_modules": "all-linear"}
    assert "lora_target_modules" not in third
    searcher.on_trial_result("b", report(1.0, 1, 3))
    searcher.on_trial_complete("b", result=report(1.0, 4, MOST_STEPS))
    assert len(searcher._ot_study.trials) == 2, "Optuna does not know of it"


def test_the_model_proposes_from_results_of_the_same_problem() -> None:
    space = Space.parse(SPACE, BASELINE.replace(recipe=None))
    seen = [
        ({"lora_r": 4, "learning_rate": 10 ** -(2 + step / 4)}, abs(step / 4 - 1))
        for step in range(STARTUP_TRIALS)
    ]
    earlier = EarlierTrials(results=seen)
    searcher = TrialSearcher(space, metric="eval_loss", mode="min", seed=0, earlier=earlier)
    first, second = propose(searcher, "a"), propose(searcher, "b")
    assert first == {"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4}, "the baseline is the first trial"
    assert origins(searcher) == [FROM_BASELINE, TPE]
    stored = searcher._ot_study.trials
    assert [trial.value for trial in stored[1 : 1 + len(seen)]] == [value for _, value in seen]
    assert second["lora_r"] in (4, 8, 64)


def test_values_that_a_person_asks_for_are_the_next_trial_and_optuna_knows_them(tmp_path: Path) -> None:
    requests = UserRequests(str(tmp_path))
    space = Space.parse(SPACE, BASELINE)
    searcher = TrialSearcher(space, metric="eval_loss", mode="min", seed=0, requests=requests)
    parameters = {
        name: distribution.parameter({"lora_r": 64, "learning_rate": 3e-3}[name])
        for name, distribution in space.distributions.items()
    }
    requests.propose(parameters)
    assert propose(searcher, "a") == {"lora_r": 8, "lora_alpha": 20, "learning_rate": 1e-4}
    assert propose(searcher, "b") == {"lora_r": 64, "lora_alpha": 128, "learning_rate": 3e-3}
    assert searcher.origins["b"] == REQUESTED and trial_of(searcher, "b").params == parameters
    assert propose(searcher, "c")["learning_rate"] != 3e-3 and requests.waiting() == []
