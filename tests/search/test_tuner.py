"""Trials of a function that trains nothing, on a Ray with two CPUs and one GPU that is only counted."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
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
from vlmtune.config.options import DataSettings
from vlmtune.config.settings import Settings
from vlmtune.packed.packed_trial import PackedTrial
from vlmtune.search import trial_results as results
from vlmtune.search.isolated_trial import trial_values
from vlmtune.search.sampler import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.tuner import (
    TRIAL_CPUS,
    BaselineAwareAsha,
    diverged,
    make_scheduler,
    make_tuner,
    run_trials,
)
from vlmtune.training.launch import worker_resources
from vlmtune.training.meter import EVALUATION_NUMBER

BASELINE = Settings.from_flags(
    {"learning_rate": 1.0, "lora_r": 8, "grace_period": 0.25, "reduction_factor": 2, "recipe": None}
)
SPACE = {"learning_rate": {"uniform": [0.01, 0.5]}, "lora_r": {"choice": [4, 8]}}
STEPS = 8
TRIALS = 7

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    ray.shutdown()
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def made_trial() -> Callable[[dict[str, Any]], None]:
    """Its loss is its learning rate, and falls alike in all; the fourth trial diverges and the fifth
    raises."""

    # Inside another function, so that it is pickled as a whole: Ray's workers cannot import this module.
    def trial(config: dict[str, Any]) -> None:
        number = int(Path(tune.get_context().get_trial_dir()).name)
        if number == 4:
            raise ValueError("a trial that raises")
        for step in (2, 4, 6, 8):
            rate = config.get("point", config)["learning_rate"]
            loss = math.nan if number == 3 and step > 2 else rate - step / 100 - (number == 3)
            tune.report({"eval_loss": loss, "step": step, "max_steps": STEPS, EVALUATION_NUMBER: step // 2})

    return trial


@pytest.fixture(scope="module")
def found(
    machine: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[results.TrialResult], list[optuna.trial.FrozenTrial]]:
    """What a search of trials that run one at a time says of them, and what Optuna does."""
    space = Space.parse(SPACE, BASELINE)
    searcher = TrialSearcher(space, metric="eval_loss", mode="min", seed=0)
    numbers = iter(range(TRIALS))
    config = tune.TuneConfig(
        metric="eval_loss",
        mode="min",
        search_alg=searcher,
        scheduler=make_scheduler(BASELINE, space),
        num_samples=TRIALS,
        max_concurrent_trials=1,
        trial_dirname_creator=lambda _: str(next(numbers)),
    )
    storage = str(tmp_path_factory.mktemp("tuned"))
    grid = tune.Tuner(
        tune.with_resources(made_trial(), {"cpu": TRIAL_CPUS}),
        tune_config=config,
        run_config=tune.RunConfig(
            storage_path=storage, verbose=0, stop=partial(diverged, metric="eval_loss")
        ),
    ).fit()
    return results.trial_results(grid), searcher._ot_study.trials


def test_the_baseline_runs_to_its_end_though_others_are_better(tmp_path: Path) -> None:
    numbers = iter(range(3))
    config = tune.TuneConfig(
        metric="eval_loss",
        mode="min",
        scheduler=make_scheduler(BASELINE, Space.parse(SPACE, BASELINE)),
        max_concurrent_trials=1,
        trial_dirname_creator=lambda _: str(next(numbers)),
    )
    grid = tune.Tuner(
        tune.with_resources(made_trial(), {"cpu": TRIAL_CPUS}),
        param_space={"learning_rate": tune.grid_search([0.1, 1.0, 0.9]), "lora_r": 8},
        tune_config=config,
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    ended = {row.values["learning_rate"]: row.state for row in results.trial_results(grid)}
    assert ended == {0.1: results.COMPLETE, 1.0: results.COMPLETE, 0.9: results.PRUNED}


def made_killed_trial(mark: Path) -> type[tune.Trainable]:
    """A trial of one step whose process is killed once, while it takes on its second trial."""

    class KilledTrial(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {
                "eval_loss": trial_values(self.config)["learning_rate"],
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
    grid = run_trials(settings, space, str(tmp_path), tune.Callback(), runner, resume=False)
    assert (tmp_path / "killed").exists()
    rows = results.trial_results(grid)
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
        store: Any = None
        options: dict[str, Any] = {"workers": 1, "use_gpu": False, "eval_steps": 0.25}
        isolated_trial.run_trial(config, settings=settings, store=store, output_dir="unused", **options)

    return trial


@pytest.mark.parametrize("runner", ["packed", "isolated"])
def test_with_several_objectives_trials_that_measured_none_do_not_end_the_search(
    runner: str, tmp_path: Path
) -> None:
    settings = BASELINE.replace(more_metrics=["seconds", "peak_memory"], num_samples=2)
    trainable = tune.with_resources(made_unmeasured_trial(settings, runner), {"cpu": TRIAL_CPUS})
    searched = TrialRunner("packed", trainable, max_concurrent_trials=1, description="")
    space = Space.parse(SPACE, settings)
    grid = make_tuner(settings, space, str(tmp_path), tune.Callback(), searched, trainable).fit()
    rows = results.trial_results(grid)
    expected = results.FAILED if runner == "packed" else results.INFEASIBLE
    assert [row.state for row in rows] == [expected] * 2


def test_no_early_stopping_stops_nothing() -> None:
    settings = BASELINE.replace(early_stopping="none")
    assert type(make_scheduler(settings, Space.parse(SPACE, settings))) is FIFOScheduler


def test_asha_knows_the_baseline_of_a_search_with_constants() -> None:
    space = Space.parse({**SPACE, "lora_alpha": 32}, BASELINE)
    assert BaselineAwareAsha(space, 1, 3).baseline == {"learning_rate": 1.0, "lora_r": 8, "lora_alpha": 32}


def test_nobody_is_stopped_before_half_of_its_run_however_long_that_is() -> None:
    settings = BASELINE.replace(grace_period=0.5, reduction_factor=3)
    scheduler = BaselineAwareAsha(
        Space.parse(SPACE, settings), settings.search.grace_period, settings.search.reduction_factor
    )
    scheduler.set_search_properties("eval_loss", "min")
    decisions: dict[int, list[str]] = {}
    for number, (loss, steps) in enumerate([(1.0, 8), (2.0, 8), (9.0, 40)]):
        trial: Any = SimpleNamespace(trial_id=str(number), config={"learning_rate": 0.1, "lora_r": 4})
        controller: Any = None  # ASHA asks it for nothing
        scheduler.on_trial_add(controller, trial)
        decisions[number] = [
            scheduler.on_trial_result(
                controller, trial, {"eval_loss": loss, "step": steps * part // 4, "max_steps": steps}
            )
            for part in (1, 2)
        ]
    assert decisions[0] == ["CONTINUE", "CONTINUE"]
    assert decisions[2] == ["CONTINUE", "STOP"]


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
