"""Search for the best adapter, from settings to the finished output folder: what `ray_jobs/tune.py` calls."""

import logging
import os
from dataclasses import replace

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import TEST
from vlmtune.errors import ConfigError, SearchInterrupted
from vlmtune.evaluation.verdict import few_rows_warning
from vlmtune.search.confirm import confirm, read_confirm
from vlmtune.search.first_points import recipe_values, separate_recipe, trial_count
from vlmtune.search.max_lengths import usable_max_lengths
from vlmtune.search.objectives import check_objectives, objectives_of
from vlmtune.search.search_progress import SearchProgress, expected_share
from vlmtune.search.search_result import SearchResult
from vlmtune.search.space import Space
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_results import curves_of, trial_results
from vlmtune.search.trial_runners import make_runner
from vlmtune.search.tuner import run_trials
from vlmtune.search.warm_start import read_earlier_trials
from vlmtune.search.write_results import write_results
from vlmtune.session import SEARCH, Session

logger = logging.getLogger(__name__)

# What is searched where the config has no search_space: the rank, with an alpha of twice the rank, and the
# learning rate around those that LoRA is usually trained with.
DEFAULT_SPACE = {
    "lora_r": {"choice": [8, 16, 32]},
    "lora_alpha": {"expr": "2 * lora_r"},
    "learning_rate": {"loguniform": [2e-5, 1e-3]},
}


def run_search(settings: Settings) -> SearchResult:
    """Search, or resume an interrupted search (`settings.run.resume`), and write everything that was found.

    Raises:
        UserError: something is wrong with the settings, the data, the model or the machine. Nothing has been
            written then.
        SearchFailedError: no trial completed. The search can be resumed.
        SearchInterrupted: Ctrl-C. The search can be resumed.
    """
    if settings.search.search_space is None and settings.run.resume is None:
        settings = settings.replace(search_space=DEFAULT_SPACE)
        text = ", ".join(f"{name} {entry}" for name, entry in DEFAULT_SPACE.items())
        logger.info(console_line("Space", f"the default one, for want of a search_space: {text}"))
    session = Session.open(settings, SEARCH, check_search)
    session = replace(session, settings=judged_by_best(session.settings))
    settings, folder = session.settings, session.folder
    space = usable_space(session)
    announce(settings, space, session.cluster)
    if settings.search.report and (warning := few_rows_warning(len(session.store.rows_of(TEST)))):
        logger.info(console_line("Test", f"{warning}; give more rows, or a larger --test_fraction"))
    earlier = None if session.resumed else read_earlier_trials(settings, space, session.store.meta.key)
    runner = make_runner(settings, space, session.store, folder, session.cluster)
    session.claim()
    for line in (console_line("Trials", runner.description), *runner.notes):
        logger.info(line)
    search = settings.search
    share = expected_share(search.early_stopping, search.grace_period, search.reduction_factor)
    console = TrialConsole(
        space.names,
        search.metric,
        search.mode,
        SearchProgress(trial_count(space), share),
        "GPU" if session.cluster.workers_use_gpu(settings.run.use_cpu) else "CPU",
    )
    # With Tune's own handler, Ctrl-C would look like the end of the search.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    try:
        grid = run_trials(settings, space, folder, console, runner, resume=session.resumed, earlier=earlier)
        trials = trial_results(grid)
        confirmed = confirm(settings, runner, folder, trials)
        runner.close()
        # What repeats the best trial must train it in the same way.
        session = replace(session, settings=settings.replace(trial_runner=runner.kind))
        return write_results(session, space, trials, curves_of(grid, settings.search.metric), confirmed)
    except KeyboardInterrupt:
        raise SearchInterrupted(folder) from None


def judged_by_best(settings: Settings) -> Settings:
    """The settings with `load_best_model_at_end`, unless it is switched off."""
    chosen = settings.training.load_best_model_at_end
    return settings.replace(load_best_model_at_end=True) if chosen is None else settings


def check_search(settings: Settings) -> None:
    """Raises ConfigError for settings that train.py can use and a search cannot."""
    check_objectives(settings)
    read_confirm(settings)
    if settings.run.workers == 0:
        raise ConfigError(
            "--num_workers 0: a search trains in workers of their own; give at least 1, or use train.py"
        )
    recipe_values(Space.parse(settings.search.search_space or {}, settings))


def usable_space(session: Session) -> Space:
    """The search space without values of `max_length` that the rows do not fit; logs what is removed.

    Raises:
        DataError: no value of `max_length` is left.
    """
    settings = session.settings
    usable, removed = usable_max_lengths(
        session.store, settings.search.search_space or {}, on_long_row=settings.data.on_long_row
    )
    for line in removed:
        logger.info(console_line("", line))
    return Space.parse(usable, settings)


def announce(settings: Settings, space: Space, cluster: Cluster) -> None:
    """Log what will happen, in a few lines."""
    search = settings.search
    trials = (
        f"{len(space)} trials, a full grid" if space.is_grid else f"{search.num_samples} trials, Optuna TPE"
    )
    if separate_recipe(space) is not None:
        trials += " and one of the recipe beside them"
    stopping = ", ASHA early stopping" if search.early_stopping == "asha" else ""
    goal = ", ".join(f"{mode} {name}" for name, mode in objectives_of(settings).items())
    plural = "s" if search.more_metrics else ""
    text = f"{', '.join(space.names)}: {trials}{stopping}; objective{plural}: {goal}"
    logger.info(console_line("Search", text))
    if space.baseline_outside and not space.is_grid:
        outside = ", ".join(space.baseline_outside)
        text = f"the baseline (the config's values) has {outside} outside the search space"
        logger.info(console_line("", text))
    if cluster.dashboard:
        logger.info(console_line("Dashboard", cluster.dashboard))
