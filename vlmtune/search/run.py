"""From settings to the best adapter: what `ray_jobs/tune.py` calls."""

import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from ray import tune
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from vlmtune import output, storage
from vlmtune.cluster import Cluster, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import TrialTable, format_value, labelled
from vlmtune.data.store import Store
from vlmtune.errors import INTERRUPTED, ConfigError, UserError, nearest
from vlmtune.evaluation.objective import OBJECTIVES
from vlmtune.output import located
from vlmtune.packed.messages import FAILURE, NOTES
from vlmtune.search import results
from vlmtune.search.compare import Comparison, compare
from vlmtune.search.max_lengths import usable_max_lengths
from vlmtune.search.refit import refit
from vlmtune.search.report.charts import Trials
from vlmtune.search.report.page import Report, page, pictures_of
from vlmtune.search.runner import make_runner
from vlmtune.search.space import Space
from vlmtune.search.trial import point
from vlmtune.search.tuner import run_search
from vlmtune.storage import filesystem
from vlmtune.training.run import check_same_data, claim_for, output_folder, prepared, start
from vlmtune.training.save import describe, save_adapter_folder

logger = logging.getLogger(__name__)

# What a trial reports and a search can be for.
METRICS = (
    "eval_loss",
    "train_loss",
    "seconds",
    "eval_seconds",
    "rows_per_second",
    "tokens_per_second",
    "peak_memory",
)


def search_adapter(settings: Settings) -> str:
    """Search, and write the best adapter with everything known of the search; returns the summary to print.

    Exits with 1 where no trial ran to its end, and with 130 on Ctrl-C; either way the search can be resumed.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the model or the machine, before
        anything is written.
    """
    resumed = settings.run.resume
    if resumed is not None:
        folder, settings = interrupted_search(resumed)
    else:
        folder = output_folder(settings)
        output.check_free(folder, overwrite=settings.run.overwrite)
    settings = located(settings)
    check_search(settings)
    space = Space.parse(settings.search.search_space or {}, settings)
    cluster = start(settings)
    store = prepared(settings)
    usable, reasons = usable_max_lengths(
        store, settings.search.search_space or {}, on_long_row=settings.data.on_long_row
    )
    space = Space.parse(usable, settings)
    for reason in reasons:
        logger.info(labelled("", reason))
    if resumed is not None:
        check_same_data(folder, store, "search.yaml")
    announce(settings, space, cluster)
    runner = make_runner(settings, space, store, folder, cluster)
    if resumed is None:
        claim_for(settings, folder, store, "search.yaml")
    logger.info(labelled("Trials", runner.text))
    for note in runner.notes:
        logger.info(note)
    shown = ShowTrials(space.names, settings.search.metric, settings.search.mode)
    os.environ.setdefault(
        "TUNE_DISABLE_SIGINT_HANDLER", "1"
    )  # with Tune's own, Ctrl-C looks like the end of a search
    try:
        grid = run_search(settings, space, folder, shown, runner, resume=resumed is not None)
        runner.close()
        settings = settings.replace(trial_runner=runner.kind)  # what repeats the best trial must do as it did
        return finish(
            settings,
            space,
            store,
            folder,
            cluster,
            results.rows_of(grid),
            results.curves_of(grid, settings.search.metric),
        )
    except KeyboardInterrupt:
        print(f"Interrupted. To go on: python ray_jobs/tune.py --resume {folder}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def interrupted_search(resumed: str) -> tuple[str, Settings]:
    """The folder of the search that `--resume` names, and the settings that it was started with.

    Raises:
        ConfigError: no search is there, or one that has ended.
    """
    folder = output.place(resumed, in_job=in_ray_job(), flag="--resume")
    if not storage.exists(f"{folder}/search.yaml"):
        raise ConfigError(
            f"--resume {folder}: no search is there (search.yaml is missing); name the --output_dir of an interrupted one"
        )
    if storage.exists(f"{folder}/trials.parquet"):
        raise ConfigError(f"--resume {folder}: this search has ended, nothing is left to do")
    options = yaml12.load_options(storage.read_text(f"{folder}/search.yaml"))
    if options is None:
        raise ConfigError(f"--resume {folder}: search.yaml is damaged; start a new search")
    return folder, Settings.from_flags(options)


def check_search(settings: Settings) -> None:
    """Raises ConfigError for options that train.py can use and a search cannot."""
    metric, mode = settings.search.metric, settings.search.mode
    known = (*METRICS, *OBJECTIVES)
    if metric not in known:
        raise ConfigError(
            f"--metric {metric}: no trial reports it; there are {', '.join(known)}{nearest(metric, known)}"
        )
    if metric in OBJECTIVES and mode != (right := results.mode_of(metric)):
        raise ConfigError(
            f"--metric {metric}: of answers the {'larger' if right == 'max' else 'smaller'} is the better; add --mode {right}"
        )
    more = settings.search.more_metrics or []
    for name in more:
        if name not in METRICS:
            raise ConfigError(
                f"--more_metrics {name}: no trial reports it; there are {', '.join(METRICS)}{nearest(name, METRICS)}"
            )
        if name == metric or more.count(name) > 1:
            raise ConfigError(f"--more_metrics {name}: is an objective already; name it once")
    if settings.run.workers == 0:
        raise ConfigError(
            "--num_workers 0: a search trains in workers of their own; give at least 1, or use train.py"
        )


def announce(settings: Settings, space: Space, cluster: Cluster) -> None:
    """What will happen, in a few lines."""
    search = settings.search
    trials = (
        f"{len(space)} trials, a full grid" if space.is_grid else f"{search.num_samples} trials, Optuna TPE"
    )
    stopping = ", ASHA early stopping" if search.early_stopping == "asha" else ""
    objectives = ", ".join(f"{mode} {name}" for name, mode in objectives_of(settings).items())
    plural = "s" if search.more_metrics else ""
    searched = f"{', '.join(space.names)}: {trials}{stopping}; objective{plural}: {objectives}"
    logger.info(labelled("Search", searched))
    if space.outside and not space.is_grid:
        outside = ", ".join(space.outside)
        logger.info(
            labelled("", f"the first trial keeps the config's own {outside}, outside the search space")
        )
    if cluster.dashboard:
        logger.info(labelled("Dashboard", cluster.dashboard))


def objectives_of(settings: Settings) -> dict[str, str]:
    """The mode of each metric that the search is for; the first one decides early stopping and the best
    trial."""
    search = settings.search
    return {search.metric: search.mode, **{name: results.mode_of(name) for name in search.more_metrics or ()}}


def finish(
    settings: Settings,
    space: Space,
    store: Store,
    folder: str,
    cluster: Cluster,
    rows: list[results.TrialRow],
    curves: results.Curves,
) -> str:
    """Write the best adapter, what it is worth and then, as the mark of a search that has ended, the table;
    returns the summary."""
    search = settings.search
    best = results.best_of(rows, search.metric, search.mode)
    if best is None:
        reasons = list(dict.fromkeys(row.error for row in rows if row.error)) or [
            "Every trial was stopped, diverged or did not fit in memory."
        ]
        print(f"error: no trial ran to its end. {reasons[0]}\nLogs: {folder}/tune", file=sys.stderr)
        sys.exit(1)
    chosen = results.settings_of(best, settings)
    metrics, trained = save_best(best, chosen, store, folder, cluster)
    compared = None
    if search.report:
        own = own_trial(rows, space)
        compared = compare(
            chosen, store, cluster, f"{folder}/best", own.checkpoint if own and own is not best else None
        )
        if isinstance(compared, Comparison):
            describe(
                f"{folder}/best", chosen, {**metrics, "test": compared.facts()}, trained, compared.card()
            )
        trials = Trials(rows, curves, objectives_of(settings), best, own)
        counts = {split: len(store.rows_of(split)) for split in ("train", "eval", "test")}
        pictures = pictures_of(compared, store, chosen)
        gpus = chosen.run.max_workers if cluster.workers_use_gpu(chosen.run.use_cpu) else 0
        report = Report(
            chosen,
            trials,
            space.names,
            list(space.distributions),
            compared,
            pictures,
            folder,
            store.meta.key,
            counts,
            gpus,
        )
        storage.write_text(f"{folder}/report.html", page(report))
    results.write_table(rows, space.names, folder, objectives_of(settings))
    return summary(
        settings, space, store, folder, cluster, rows, best, compared, refitted=trained is not store
    )


def save_best(
    best: results.TrialRow, chosen: Settings, store: Store, folder: str, cluster: Cluster
) -> tuple[dict[str, Any], Store]:
    """`best/`: the best trial's adapter and curves, or with `refit` one that is trained anew, beside the
    numbers of the search.

    Returns those numbers, and the rows that the adapter was trained on.
    """
    checkpoint, metrics, runs = best.checkpoint, reported(best.metrics), f"{folder}/runs/{best.trial_id}"
    if chosen.search.refit:
        try:
            checkpoint, store = refit(chosen, store, folder, cluster)
            metrics |= {"refit_rows": len(store.rows_of("train"))}
            runs = f"{folder}/tune/refit/runs"
        except (UserError, TrainingFailedError, RayError) as error:  # the search has its result
            why = results.reason(str(error))
            logger.info(labelled("Refit", f"not done, the search's own adapter stays: {why}"))
    source, inner = filesystem(runs)
    target, out = filesystem(f"{folder}/best/runs")
    target.create_dir(out, recursive=True)
    pafs.copy_files(inner, out, source_filesystem=source, destination_filesystem=target)
    save_adapter_folder(checkpoint, f"{folder}/best", chosen, metrics, store)
    return metrics, store


def own_trial(rows: list[results.TrialRow], space: Space) -> results.TrialRow | None:
    """The trial of the config's own values, if it ran to its end."""
    values = {**space.own, **space.constants}  # Tune may give the trials of a resumed search in another order
    return next((row for row in rows if row.state == results.COMPLETE and row.values == values), None)


def summary(
    settings: Settings,
    space: Space,
    store: Store,
    folder: str,
    cluster: Cluster,
    rows: list[results.TrialRow],
    best: results.TrialRow,
    compared: Comparison | str | None,
    *,
    refitted: bool,
) -> str:
    """What was found and where it is, to print."""
    metric = settings.search.metric
    counts = {state: sum(row.state == state for row in rows) for state in results.STATES}
    own = own_trial(rows, space)
    searched = ", ".join(f"{name} {format_value(best.values[name])}" for name in space.names)
    objectives = objectives_of(settings)
    front = ", ".join(f"trial {rows.index(row) + 1}" for row in results.front_of(rows, objectives))
    baseline = f" (the config's own values: {format_value(own.metrics[metric])})" if own else ""
    trained_again = (
        f" (trained once more on the {len(store.rows_of('train')) + len(store.rows_of('eval'))} rows of train and eval)"
        if refitted
        else ""
    )
    lines = [
        labelled(
            "Best",
            f"trial {rows.index(best) + 1} of {len(rows)}: {metric} {format_value(best.metrics[metric])}{baseline}",
        )
    ]
    if compared is not None:
        lines.append(labelled("Test", compared.line() if isinstance(compared, Comparison) else compared))
    lines.append(labelled("Values", searched))
    if len(objectives) > 1:
        lines.append(labelled("Front", f"{front}: none is better in all of {', '.join(objectives)}"))
    states = ", ".join(f"{count} {state.lower()}" for state, count in counts.items() if count)
    lines += [labelled("Trials", states), labelled("Adapter", f"{folder}/best{trained_again}")]
    if compared is not None:
        lines.append(labelled("Report", f"{folder}/report.html"))
    lines += [
        labelled("Table", f"{folder}/trials.parquet"),
        labelled("Curves", f"tensorboard --logdir {folder}/runs"),
    ]
    if cluster.dashboard:
        lines.append(labelled("Dashboard", f"{cluster.dashboard} (while Ray runs)"))
    return "\n".join(["", *lines])


def reported(metrics: dict[str, Any]) -> dict[str, Any]:
    """The run's own numbers out of a Tune result, which mixes them with Tune's bookkeeping."""
    names = ("step", "max_steps", "epoch", "seconds", "peak_memory", "data_wait_fraction", "train_loss")
    return {
        name: value
        for name, value in metrics.items()
        if name in (*names, *OBJECTIVES) or name.startswith("eval_") or name.endswith("_per_second")
    }


class ShowTrials(tune.Callback):
    """Passes what Tune knows of the trials on to the console. Makes its table at the start: Tune pickles
    callbacks before it, to resume."""

    def __init__(self, names: list[str], metric: str, mode: str) -> None:
        self.names, self.metric, self.mode = names, metric, mode
        self.shown: TrialTable | None = None

    def setup(self, *_: Any, **__: Any) -> None:
        self.shown = TrialTable(self.names, self.metric, self.mode)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        for earlier in trials:  # those that had ended when the search was interrupted
            if earlier.is_finished() and self.shown and _number(earlier, trials) not in self.shown.rows:
                self._show(trials, earlier)
        self._show(trials, trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        for note in result.get(NOTES, ()):
            logger.info(note)
        if result.get("step", math.inf) < result.get("max_steps", 0):
            self._show(trials, trial, "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._show(trials, trial, results.state_of(trial.last_result, failed=False).lower())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._show(trials, trial, results.FAILED.lower())

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        if self.shown:
            self.shown.close()

    def _show(
        self, trials: list[Any], trial: Any, state: str | None = None, result: dict[str, Any] | None = None
    ) -> None:
        result = result or trial.last_result or {}
        known = dict(point(trial.config))
        if "step" in result:
            known |= {name: result[name] for name in ("step", "max_steps", self.metric)} | {
                "seconds": round(result["time_total_s"])
            }
        if trial.error_file is not None:
            known["error"] = results.reason(Path(trial.error_file).read_text())
        elif FAILURE in result:
            known["error"] = result[FAILURE]
        if self.shown:
            ended = results.state_of(result, failed=trial.error_file is not None).lower()
            self.shown.update(_number(trial, trials), state=state or ended, **known)


def _number(trial: Any, trials: list[Any]) -> int:
    """A trial's number in the table, from 1."""
    return 1 + sum(
        results.proposed(one.experiment_tag) < results.proposed(trial.experiment_tag) for one in trials
    )
