"""Search for the best adapter, from settings to the finished output folder: what `ray_jobs/tune.py` calls."""

import logging
import os
from dataclasses import replace

import pyarrow.fs as pafs

from vlmtune import storage
from vlmtune.checksums import damaged_file
from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import TEST
from vlmtune.errors import ConfigError, RunStoppedError, named_interrupt
from vlmtune.evaluation.verdict import few_rows_warning
from vlmtune.faults import disk_reason, output_fault
from vlmtune.packed.messages import BEST_CHECKPOINT
from vlmtune.run_state import SEARCH
from vlmtune.search.confirm import confirm, read_confirm, runs_to_confirm
from vlmtune.search.first_points import recipe_outside_space, recipe_values, trial_count
from vlmtune.search.max_lengths import usable_max_lengths
from vlmtune.search.objectives import check_objectives, objectives_of
from vlmtune.search.resolutions import (
    announce_resolutions,
    check_lengths,
    prepare_resolutions,
    searched_resolutions,
)
from vlmtune.search.saved_trials import End, SavedTrial, read_trials
from vlmtune.search.search_progress import ExpectedSteps, SearchProgress
from vlmtune.search.search_result import SearchResult
from vlmtune.search.space import Space
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_results import curves_of, trial_results
from vlmtune.search.trial_runners import make_runner, runner_kind
from vlmtune.search.tuner import run_trials
from vlmtune.search.warm_start import EarlierTrials, read_earlier_trials
from vlmtune.search.write_results import write_results
from vlmtune.session import Session

logger = logging.getLogger(__name__)

# What is searched if the config has no search_space: the rank, with an alpha of twice the rank, and the
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
        RunInterrupted: Ctrl-C. The search can be resumed.
    """
    if settings.search.search_space is None and settings.run.resume is None:
        settings = settings.replace(search_space=DEFAULT_SPACE)
        text = ", ".join(f"{name} {entry}" for name, entry in DEFAULT_SPACE.items())
        logger.info(console_line("Space", f"the default one, as the config has no search_space: {text}"))
    with Session.open(settings, SEARCH, check_search) as session:
        try:
            with named_interrupt(lambda: session.watch.resume):
                return _search(session)
        except OSError as error:
            reason = disk_reason(error)
            if reason is None:
                raise
            raise RunStoppedError(
                output_fault(session.folder, f"{reason}: {error.filename or ''}")
            ) from error


def _search(session: Session) -> SearchResult:
    session = session.with_settings(with_best_model_at_end(session.settings))
    settings, folder = session.settings, session.folder
    space = Space.parse(settings.search.search_space or {}, settings)
    session = replace(session, store=prepare_resolutions(settings, space, session.store))
    check_lengths(settings, session.store)
    space = usable_space(session)
    announce(settings, space, session.cluster)
    announce_resolutions(session.store)
    if settings.search.report and (warning := few_rows_warning(len(session.store.rows_of(TEST)))):
        logger.info(console_line("Test", f"{warning}; give more rows, or a larger --test_fraction"))
    trials = read_interrupted_trials(folder) if session.resumed else []
    # Ray Tune's own handler would make Ctrl-C look like the end of the search, and its loggers would write
    # what `SavedTrials` writes anyway.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    confirmed = None
    if sum(trial.end is not None for trial in trials) < trial_count(space) or read_confirm(settings):
        warm_start = read_warm_start(session, space)
        runner = make_runner(settings, space, session.store, folder, session.cluster)
        session.claim()
        for line in (console_line("Trials", runner.description), *runner.notes):
            logger.info(line)
        if "://" not in folder:
            logger.info(console_line("Live", f"vlmtune ui {folder}"))
        total, side_by_side = trial_count(space), runner.side_by_side
        again = runs_to_confirm(settings, total)
        progress = SearchProgress(total, ExpectedSteps.of(settings.search), side_by_side, again)
        console = make_console(session, space.names, progress)
        trials = run_trials(settings, space, folder, console, runner, trials, warm_start)
        console = make_console(session, [*space.names, "seed"], SearchProgress(again, at_once=side_by_side))
        confirmed = confirm(settings, runner, folder, trial_results(trials), console)
        runner.close()
    else:
        logger.info(console_line("", "all trials have ended; only the results are written again"))
    # Whoever repeats the best trial must train it with the same runner.
    session = session.with_settings(settings.replace(trial_runner=runner_kind(settings, space)))
    curves = curves_of(trials, settings.search.metric)
    losses = curves_of(trials, "train_loss")
    result = write_results(session, space, trial_results(trials), curves, confirmed, losses)
    session.with_settings(settings).finish()
    return result


def make_console(session: Session, names: list[str], progress: SearchProgress) -> TrialConsole:
    """The console of trials in which the options of these names differ."""
    search = session.settings.search
    device = "GPU" if session.cluster.workers_use_gpu(session.settings.run.use_cpu) else "CPU"
    return TrialConsole(names, search.metric, search.mode, progress, device)


def read_interrupted_trials(folder: str) -> list[SavedTrial]:
    """Read the trials of an interrupted search, ready to continue, and log what is lost."""
    trials, damaged = read_trials(folder)
    for name in damaged:
        logger.info(
            console_line(
                "", f"{folder}/tune/{name} is damaged, and so is its copy: another trial takes its place"
            )
        )
    for trial in trials:
        trial.reopen()
        lost = damaged_checkpoint(trial)
        if lost is not None:
            rewind_before_damage(trial, folder)
            text = f"{lost} is damaged: trial {trial.number + 1} continues from the checkpoint before it"
            logger.info(console_line("", text))
    ended = sum(trial.end is not None for trial in trials)
    logger.info(
        console_line(
            "Resumed", f"{ended} trials have ended, {len(trials) - ended} continue from their checkpoints"
        )
    )
    return trials


def rewind_before_damage(trial: SavedTrial, folder: str) -> None:
    """Let a finished trial train again from before its damaged checkpoint, which is deleted."""
    files, inner = storage.filesystem(f"{folder}/tune/train/{trial.trial_id}")
    damaged = trial.last_report[BEST_CHECKPOINT].rpartition("/")[2]
    if damaged.startswith("checkpoint-"):  # the trial was packed
        step = int(damaged.rpartition("-")[2])
        for entry in files.get_file_info(pafs.FileSelector(inner, allow_not_found=True)):
            name, _, number = entry.base_name.rpartition("-")
            if name == "checkpoint" and int(number) >= step:
                files.delete_dir(entry.path)
    else:  # Ray Train names checkpoints by the time and keeps a list of them, so the trial starts again
        step = 0
        if files.get_file_info(inner).type == pafs.FileType.Directory:
            files.delete_dir(inner)
    trial.end, trial.reports = None, [one for one in trial.reports if one["step"] < step]


def read_warm_start(session: Session, space: Space) -> EarlierTrials | None:
    """The trials of the earlier searches that `--warm_start` names.

    Raises:
        ConfigError: one of these searches cannot be read. A resumed search continues without them.
    """
    try:
        return read_earlier_trials(session.settings, space, session.store.meta.key)
    except ConfigError as error:
        if not session.resumed:
            raise
        logger.info(console_line("", f"{error}; the search continues without it"))
        return None


def with_best_model_at_end(settings: Settings) -> Settings:
    """The settings with `load_best_model_at_end` switched on, unless the user switched it off."""
    chosen = settings.training.load_best_model_at_end
    return settings.replace(load_best_model_at_end=True) if chosen is None else settings


def damaged_checkpoint(trial: SavedTrial) -> str | None:
    """The file of a finished trial's last checkpoint that is missing or damaged; None if none is."""
    path = trial.last_report.get(BEST_CHECKPOINT)
    if trial.end is not End.LAST_REPORT or path is None:
        return None
    files, inner = storage.filesystem(path)
    if files.get_file_info(inner).type != pafs.FileType.Directory:
        return str(path)
    name = damaged_file(files, inner)
    return None if name is None else f"{path}/{name}"


def check_search(settings: Settings) -> None:
    """Raises ConfigError for settings that train.py can use and a search cannot."""
    check_objectives(settings)
    read_confirm(settings)
    if settings.run.workers == 0:
        raise ConfigError(
            "--num_workers 0: a search trains in workers of their own; give at least 1, or use train.py"
        )
    space = Space.parse(settings.search.search_space or {}, settings)
    recipe_values(space)
    searched_resolutions(space)


def usable_space(session: Session) -> Space:
    """The search space without values of `max_length` that are too small for the rows; logs the removed ones.

    Raises:
        DataError: no value of `max_length` is left.
    """
    settings = session.settings
    usable, removed = usable_max_lengths(
        session.store.largest, settings.search.search_space or {}, on_long_row=settings.data.on_long_row
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
    if recipe_outside_space(space) is not None:
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
