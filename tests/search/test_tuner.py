"""Trials of a function that trains nothing, on a Ray with two CPUs and one GPU that is only counted."""

import dataclasses
import errno
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from vlmtune.cluster import connect
from vlmtune.compat.ray_tune import optuna_study
from vlmtune.config.options import DataSettings
from vlmtune.config.settings import Settings
from vlmtune.errors import RunStoppedError
from vlmtune.packed.packed_trial import PackedTrial
from vlmtune.search import trial_results as results
from vlmtune.search.failure import no_trial_completed
from vlmtune.search.first_points import trial_count
from vlmtune.search.saved_trials import End, SavedTrial, read_trials
from vlmtune.search.search_progress import SearchProgress
from vlmtune.search.searcher import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.tuner import BaselineAwareAsha, make_scheduler, run_trials
from vlmtune.training.launch import worker_resources
from vlmtune.training.meter import EVALUATION_NUMBER

BASELINE = Settings.from_flags(
    {"learning_rate": 1.0, "lora_r": 8, "grace_period": 0.25, "reduction_factor": 2, "recipe": None}
)
SPACE = {"learning_rate": {"uniform": [0.01, 0.5]}, "lora_r": {"choice": [4, 8]}}
STEPS = 8
TRIALS = 7

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    ray.shutdown()
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def made_trial(begun: Path) -> Callable[[dict[str, Any]], None]:
    """Its loss is its learning rate, and falls alike in all; the fourth trial diverges and the fifth
    raises.

    Args:
        begun: an empty folder, in which each trial leaves a file.
    """

    # Inside another function, so that it is pickled as a whole: Ray's workers cannot import this module.
    def trial(config: dict[str, Any]) -> None:
        number = len(list(begun.iterdir()))
        (begun / config["vlmtune_trial"]).touch()
        if number == 4:
            raise ValueError("a trial that raises")
        for step in (2, 4, 6, 8):
            rate = config["point"]["learning_rate"]
            loss = math.nan if number == 3 and step > 2 else rate - step / 100 - (number == 3)
            tune.report({"eval_loss": loss, "step": step, "max_steps": STEPS, "evaluation": step // 2})

    return trial


def runner_of(trainable: Any, **options: Any) -> TrialRunner:
    return TrialRunner("isolated", trainable, max_concurrent_trials=1, description="", **options)


def run_all(
    settings: Settings, space: Space, folder: str, runner: TrialRunner, trials: Sequence[SavedTrial] = ()
) -> list[SavedTrial]:
    """Run the trials of a search, shown as the command shows them."""
    console = TrialConsole(space.names, "eval_loss", "min", SearchProgress(trial_count(space)), "CPU")
    return run_trials(settings, space, folder, console, runner, trials)


@pytest.fixture(scope="module")
def searched(machine: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SavedTrial]]:
    """A search of trials that run one at a time: its folder, and its trials."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "begun").mkdir()
    settings = BASELINE.replace(search_space=SPACE, num_samples=TRIALS, seed=3)
    trials = run_all(
        settings, Space.parse(SPACE, settings), str(folder), runner_of(made_trial(folder / "begun"))
    )
    return folder, trials


@pytest.fixture(scope="module")
def found(
    searched: tuple[Path, list[SavedTrial]],
) -> tuple[list[results.TrialResult], list[optuna.trial.FrozenTrial]]:
    """How its trials ended, and what Optuna is told of them where the search is resumed from its files."""
    searcher = TrialSearcher(Space.parse(SPACE, BASELINE), metric="eval_loss", mode="min", seed=3)
    saved, damaged = read_trials(str(searched[0]))
    assert not damaged
    searcher.replay(saved)
    return results.trial_results(searched[1]), optuna_study(searcher).trials


def test_what_is_saved_of_the_trials_is_what_they_were(searched: tuple[Path, list[SavedTrial]]) -> None:
    folder, trials = searched
    saved, _ = read_trials(str(folder))
    assert len(saved) == TRIALS
    assert [repr(one) for one in saved] == [repr(one) for one in trials]


def test_a_resumed_search_goes_on_and_runs_no_trial_again(
    searched: tuple[Path, list[SavedTrial]], tmp_path: Path
) -> None:
    """Extended by two trials, with the first one lost and the last one unfinished."""
    folder, _ = searched
    shutil.copytree(folder, tmp_path / "copy")
    trials, _ = read_trials(str(tmp_path / "copy"))
    lost, unfinished = trials[0], trials[-1]
    unfinished.end, unfinished.reports = None, unfinished.reports[:1]
    settings = BASELINE.replace(search_space=SPACE, num_samples=TRIALS + 2, seed=3)
    begun = tmp_path / "begun"
    begun.mkdir()
    after = run_all(
        settings,
        Space.parse(SPACE, settings),
        str(tmp_path / "copy"),
        runner_of(made_trial(begun)),
        trials[1:],
    )
    assert [trial.number for trial in after] == list(range(TRIALS + 2))
    assert after[0].values == lost.values == {"learning_rate": 1.0, "lora_r": 8}
    assert {path.name for path in begun.iterdir()} == {
        after[0].trial_id,
        unfinished.trial_id,
        *(trial.trial_id for trial in after[-2:]),
    }
    assert len({trial.trial_id for trial in after}) == TRIALS + 2


def made_killed_trial(mark: Path) -> type[tune.Trainable]:
    """A trial of one step whose process is killed once, while it takes on its second trial."""

    class KilledTrial(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {
                "eval_loss": self.config["point"]["learning_rate"],
                "step": STEPS,
                "max_steps": STEPS,
                EVALUATION_NUMBER: 1,
                "done": True,
            }

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self.config = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}

        def load_checkpoint(self, checkpoint: Any) -> None: ...

    return KilledTrial


@pytest.mark.parametrize(
    "values", [{"grid": [0.1, 0.2, 0.3]}, {"uniform": [0.1, 0.3]}], ids=["grid", "optuna"]
)
def test_a_process_killed_while_it_takes_on_a_trial_loses_none(
    values: dict[str, Any], tmp_path: Path
) -> None:
    settings = BASELINE.replace(search_space={"learning_rate": values}, early_stopping="none", num_samples=3)
    runner = TrialRunner(
        "packed",
        made_killed_trial(tmp_path / "killed"),
        max_concurrent_trials=1,
        description="",
        reuse_actors=True,
        max_failures=1,
    )
    space = Space.parse(settings.search.search_space, settings)
    rows = results.trial_results(run_all(settings, space, str(tmp_path), runner))
    assert (tmp_path / "killed").exists()
    assert [row.state for row in rows] == [results.COMPLETE] * 3
    assert [row.metrics["eval_loss"] for row in rows] == [row.values["learning_rate"] for row in rows]
    assert len({row.trial_id for row in rows}) == len({row.values["learning_rate"] for row in rows}) == 3


def test_the_first_trial_is_the_baseline(found: Any) -> None:
    rows, _ = found
    assert rows[0].values == {"learning_rate": 1.0, "lora_r": 8}
    assert rows[0].state == results.COMPLETE


def test_trials_that_fall_behind_are_stopped_and_pruned_everywhere(found: Any) -> None:
    rows, stored = found
    assert len(rows) == len(stored) == TRIALS
    stopped = [number for number, row in enumerate(rows) if row.state == results.PRUNED and number != 3]
    assert stopped
    for number in stopped:
        steps = rows[number].metrics["step"]
        assert steps < STEPS
        assert stored[number].state is TrialState.PRUNED
        assert sorted(stored[number].intermediate_values) == list(range(1, steps // 2 + 1))
    for number, row in enumerate(rows):
        if row.state == results.COMPLETE:
            assert stored[number].state is TrialState.COMPLETE
            assert stored[number].value == row.metrics["eval_loss"]


def test_a_trial_that_diverges_is_stopped_at_once_and_never_the_best(found: Any) -> None:
    rows, stored = found
    assert rows[3].state == results.PRUNED
    assert rows[3].metrics["step"] == 4
    assert stored[3].state is TrialState.PRUNED
    best = results.best_trial(rows, "eval_loss", "min")
    assert best is not None and best is not rows[3]


def test_a_trial_that_raises_is_failed_with_its_reason_and_the_others_go_on(found: Any) -> None:
    rows, stored = found
    assert (rows[4].state, rows[4].error) == (results.FAILED, "ValueError: a trial that raises")
    assert stored[4].state is TrialState.FAIL
    assert {row.state for row in rows[5:]} <= {results.COMPLETE, results.PRUNED}


def made_unmeasured_trial(settings: Settings, runner: str) -> Any:
    """A real trial of a runner that does not fit in memory (isolated) or cannot be trained (packed)."""
    if runner == "packed":
        # With these shares no row is left to train on, which `Settings.replace` refuses.
        wrong = dataclasses.replace(settings, data=DataSettings(eval_fraction=0.6, test_fraction=0.6))
        return tune.with_parameters(PackedTrial, settings=wrong)

    def trial(config: dict[str, Any]) -> None:
        from vlmtune.errors import DoesNotFitError
        from vlmtune.search import isolated_trial

        def run_on_ray(*_: Any, **__: Any) -> None:
            raise DoesNotFitError("no row fits")

        isolated_trial.run_on_ray = run_on_ray  # type: ignore[assignment]
        store: Any = SimpleNamespace(at=lambda resolution: None)
        options: dict[str, Any] = {"workers": 1, "use_gpu": False, "eval_steps": 0.25}
        isolated_trial.run_trial(config, settings=settings, store=store, output_dir="unused", **options)

    return trial


@pytest.mark.parametrize("runner", ["packed", "isolated"])
def test_with_several_objectives_trials_that_measured_none_do_not_end_the_search(
    runner: str, tmp_path: Path
) -> None:
    settings = BASELINE.replace(more_metrics=["seconds", "peak_memory"], num_samples=2)
    searched = runner_of(made_unmeasured_trial(settings, runner))
    rows = results.trial_results(run_all(settings, Space.parse(SPACE, settings), str(tmp_path), searched))
    expected = results.FAILED if runner == "packed" else results.INFEASIBLE
    assert [row.state for row in rows] == [expected] * 2


def test_no_early_stopping_stops_nothing() -> None:
    settings = BASELINE.replace(early_stopping="none")
    assert isinstance(make_scheduler(settings, Space.parse(SPACE, settings)), FIFOScheduler)


def test_asha_knows_the_baseline_of_a_search_with_constants() -> None:
    space = Space.parse({**SPACE, "lora_alpha": 32}, BASELINE)
    assert BaselineAwareAsha(space, 1, 3).baseline == {"learning_rate": 1.0, "lora_r": 8, "lora_alpha": 32}


def scheduled(scheduler: Any, number: int, loss: float, steps: int, rate: float = 0.1) -> list[str]:
    """The decisions on a trial that reports at a quarter and at half of its steps."""
    trial = SimpleNamespace(
        trial_id=str(number),
        config={"vlmtune_trial": f"own {number}", "point": {"learning_rate": rate, "lora_r": 8}},
    )
    scheduler.on_trial_add(None, trial)
    return [
        scheduler.on_trial_result(
            None, trial, {"eval_loss": loss, "step": steps * part // 4, "max_steps": steps}
        )
        for part in (1, 2)
    ]


def half_asha(earlier: Sequence[SavedTrial] = ()) -> Any:
    settings = BASELINE.replace(grace_period=0.5, reduction_factor=3)
    scheduler = make_scheduler(settings, Space.parse(SPACE, settings), earlier)
    scheduler.set_search_properties("eval_loss", "min")
    return scheduler


def test_nobody_is_stopped_before_half_of_its_run_however_long_that_is() -> None:
    scheduler = half_asha()
    assert scheduled(scheduler, 0, 1.0, 8) == ["CONTINUE", "CONTINUE"]
    scheduled(scheduler, 1, 2.0, 8)
    assert scheduled(scheduler, 2, 9.0, 40) == ["CONTINUE", "STOP"]
    assert "own 2" in scheduler.stopped


def test_the_baseline_is_never_stopped() -> None:
    scheduler = half_asha()
    for number in range(3):
        scheduled(scheduler, number, 1.0, 8)
    assert scheduled(scheduler, 4, 9.0, 8, rate=1.0) == ["CONTINUE", "CONTINUE"]
    assert scheduled(scheduler, 5, 9.0, 8) == ["CONTINUE", "STOP"]


def test_the_rungs_of_an_interrupted_search_count() -> None:
    reports = [{"eval_loss": 1.0, "step": step, "max_steps": 8} for step in (4, 8)]
    earlier = [
        SavedTrial(number, f"e{number}", {}, reports=reports, end=End.LAST_REPORT) for number in range(3)
    ]
    assert scheduled(half_asha(), 9, 5.0, 8) == ["CONTINUE", "CONTINUE"]
    assert scheduled(half_asha(earlier), 9, 5.0, 8) == ["CONTINUE", "STOP"]


def test_what_stops_a_whole_search(tmp_path: Path) -> None:
    settings = BASELINE.replace(search_space=SPACE, num_samples=2, time_budget_s=10.0)

    def slow(config: dict[str, Any]) -> None:
        time.sleep(60)

    trials = run_all(settings, Space.parse(SPACE, settings), str(tmp_path), runner_of(slow))
    assert {trial.end for trial in trials} == {End.BUDGET}
    assert "2 trials ended unfinished after --time_budget_s 10" in no_trial_completed(
        results.trial_results(trials), settings, "out"
    )

    def full(config: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = settings.replace(time_budget_s=None)
    with pytest.raises(RunStoppedError, match=r"no space is left on the disk.*--resume"):
        run_all(settings, Space.parse(SPACE, settings), str(tmp_path / "full"), runner_of(full))
    assert {trial.end for trial in read_trials(str(tmp_path / "full"))[0]} == {None}, "it can be resumed"


def test_a_driver_without_a_gpu_gives_its_workers_one() -> None:
    assert not torch.cuda.is_available()
    cluster = connect()
    assert (cluster.gpus, cluster.workers_use_gpu(False), cluster.workers_use_gpu(True)) == (1, True, False)
    assert cluster.fitting_trials(1, False) == 1
    assert ray.get_gpu_ids() == []

    def seen() -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]

    on_gpu, plain = worker_resources(True), worker_resources(False)
    assert ray.get(ray.remote(num_cpus=on_gpu["CPU"], num_gpus=on_gpu["GPU"])(seen).remote()) == [0]
    assert "GPU" not in plain
