"""Which trials Tune is given, and under which id their proposer learns of them."""

from vlmtune.config.settings import Settings
from vlmtune.packed.messages import TRIAL_ID, VALUES
from vlmtune.search.first_points import GRID
from vlmtune.search.isolated_trial import ORIGIN
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.search.searcher import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.trial_queue import GridPoints, TrialQueue

BASELINE = Settings.from_flags({"lora_r": 8, "learning_rate": 1e-4, "recipe": None})
SPACE = {"lora_r": {"choice": [4, 8, 64]}, "learning_rate": {"loguniform": [1e-5, 1e-2]}}


def searcher() -> TrialSearcher:
    return TrialSearcher(Space.parse(SPACE, BASELINE), metric="eval_loss", mode="min", seed=3)


def report(number: int, step: int = 8) -> dict[str, float]:
    return {"eval_loss": 1.0 + number, "evaluation": step // 4, "step": step, "max_steps": 8}


def run(queue: TrialQueue, count: int) -> list[SavedTrial]:
    """Run trials one at a time to their end."""
    for _ in range(count):
        number = len(queue._own_ids)
        config = queue.suggest(f"tune's {number}")
        assert config is not None
        trial = queue.trials[config[TRIAL_ID]]
        assert config[VALUES] == trial.values
        trial.add_report(report(trial.number))
        trial.end = End.LAST_REPORT
        queue.on_trial_complete(f"tune's {number}", trial.last_report)
    return sorted(queue.trials.values(), key=lambda one: one.number)


def test_a_resumed_search_proposes_what_an_undisturbed_one_would() -> None:
    whole = run(TrialQueue(searcher(), [], 8), 8)
    begun = run(TrialQueue(searcher(), [], 8), 5)
    resumed = run(TrialQueue(searcher(), begun, 8), 3)
    assert [one.values for one in resumed] == [one.values for one in whole]
    assert len({str(one.values) for one in whole}) == 8, "no proposal comes twice"


def test_unfinished_trials_come_first_with_their_own_id_and_values() -> None:
    ended, begun = SavedTrial(0, "a", {"lora_r": 1}, end=End.LAST_REPORT), SavedTrial(1, "b", {"lora_r": 2})
    queue = TrialQueue(GridPoints([{"lora_r": n} for n in (1, 2, 3)]), [ended, begun], 3)
    assert queue.left == 2
    assert queue.suggest("x") == {VALUES: {"lora_r": 2}, ORIGIN: GRID, TRIAL_ID: "b"}
    config = queue.suggest("y")
    assert config is not None
    assert config[VALUES] == {"lora_r": 3}
    assert (queue.left, queue.suggest("z")) == (0, None)


def test_a_lost_baseline_is_the_baseline_again() -> None:
    begun = run(TrialQueue(searcher(), [], 4), 3)
    queue = TrialQueue(searcher(), begun[1:], 4)
    config = queue.suggest("x")
    assert config is not None
    assert config[VALUES] == {"lora_r": 8, "learning_rate": 1e-4}
    assert [trial.values for trial in begun[1:]] == [queue.trials[one.trial_id].values for one in begun[1:]]
