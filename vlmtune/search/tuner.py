"""Build and run the search: Ray Tune drives, Optuna proposes, ASHA stops early, Ray Train trains each trial."""

import math
from functools import partial
from typing import Any

from ray import tune
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vlmtune.cluster import Cluster
from vlmtune.config import Settings
from vlmtune.data.store import Store
from vlmtune.search.sampler import TrialSearch
from vlmtune.search.space import Space
from vlmtune.training.launch import run_on_ray

TRIAL_CPUS = 0.01  # a trial's driver only waits for its workers; a whole CPU each would leave none for them
POINT = "point"  # the key of a grid point in a trial's Tune config


def run_search(
    settings: Settings, store: Store, output_dir: str, cluster: Cluster, callback: tune.Callback, *, resume: bool
) -> tune.ResultGrid:
    """Run the search of `settings` into `output_dir`/tune, or go on with the one that is there."""
    space = Space.parse(settings.search.search_space or {}, settings)
    trial = tune.with_resources(
        partial(
            run_trial,
            values=settings.to_dict(),
            store=store,
            output_dir=output_dir,
            use_gpu=cluster.workers_use_gpu(settings.get("use_cpu")),
        ),
        {"cpu": TRIAL_CPUS},
    )
    folder = f"{output_dir}/tune"
    if resume:
        return tune.Tuner.restore(folder, trial, resume_unfinished=True, restart_errored=True).fit()
    search = settings.search
    workers = settings.data.workers
    most_workers = workers if isinstance(workers, int) else workers[1]
    config = tune.TuneConfig(
        metric=search.metric,
        mode=search.mode,
        search_alg=None if space.is_grid else TrialSearch(space, metric=search.metric, mode=search.mode, seed=settings.get("seed")),
        scheduler=make_scheduler(settings),
        num_samples=1 if space.is_grid else search.num_samples,
        max_concurrent_trials=search.max_concurrent_trials or cluster.fitting_trials(max(most_workers, 1), settings.get("use_cpu")),
        time_budget_s=search.time_budget_s,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    tuner = tune.Tuner(
        trial,
        param_space={POINT: tune.grid_search(space.grid())} if space.is_grid else None,
        tune_config=config,
        run_config=tune.RunConfig(name="tune", storage_path=output_dir, verbose=0, callbacks=[callback]),
    )
    return tuner.fit()


def make_scheduler(settings: Settings) -> TrialScheduler:
    """ASHA over a trial's evaluations: its rungs count reports, which every trial makes at the same shares of its own run."""
    if settings.search.early_stopping == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        grace_period=settings.search.grace_period,
        reduction_factor=settings.search.reduction_factor,
        max_t=evaluations(settings) + 1,  # above the last report: ASHA must not stop a trial that has just ended by itself
    )


def evaluations(settings: Settings) -> int:
    """How often a trial evaluates, as far as the flags tell: exact for the usual share of a run, else a bound."""
    steps: float | None = settings.get("eval_steps")
    if settings.get("eval_strategy") == "epoch":
        return math.ceil(float(settings.get("num_train_epochs")))
    return math.ceil(1 / steps) if steps is not None and 0 < steps < 1 else 100


def run_trial(config: dict[str, Any], *, values: dict[str, Any], store: Store, output_dir: str, use_gpu: bool) -> None:
    """One trial: the settings with its values, trained by Ray Train, its reports passed on to Tune."""
    settings = Settings.from_dict(values).replace(**config.get(POINT, config))
    trial_id = tune.get_context().get_trial_id()
    try:
        run_on_ray(
            settings.to_dict(),
            store,
            workers=settings.data.workers,
            use_gpu=use_gpu,
            storage_path=f"{output_dir}/tune/train",
            name=trial_id,
            runs_dir=f"{output_dir}/runs/{trial_id}",
            callbacks=[TuneReportCallback()],
        )
    except TrainingFailedError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        tune.report({values.get("metric", "eval_loss"): math.inf, "infeasible": True, "step": 0, "max_steps": 1})
