"""From settings to the best adapter: what `ray_jobs/tune.py` calls."""

import sys
from typing import Any

from ray import tune

from vlmtune import output
from vlmtune.cluster import Cluster
from vlmtune.config import Settings
from vlmtune.console import TrialTable, number, say
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.search import results
from vlmtune.search.space import Space
from vlmtune.search.tuner import POINT, run_search
from vlmtune.training.run import claim_for, located, output_folder, prepared, start
from vlmtune.training.save import save_adapter_folder


def search_adapter(settings: Settings) -> str:
    """Search, and write the best adapter with everything known of the search; returns the summary to print.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the model or the machine, before anything is written.
    """
    resume = settings.data.resume
    if resume is not None:
        folder, settings = resume.rstrip("/"), Settings.load(f"{resume.rstrip('/')}/search.yaml")
    else:
        folder = output_folder(settings)
        output.check_free(folder, overwrite=settings.data.overwrite)
    settings = located(settings)
    space = Space.parse(settings.search.search_space or {}, settings)
    if not space.names:
        raise ConfigError("search_space is empty: name at least one flag to search, as in configs/demo.yaml, or use train.py")
    cluster = start(settings)
    store = prepared(settings)
    if resume is None:
        claim_for(settings, folder, store, "search.yaml")
    announce(settings, space, cluster)
    shown = TrialTable(space.names, settings.search.metric)
    try:
        grid = run_search(settings, store, folder, cluster, ShowTrials(shown), resume=resume is not None)
    finally:
        shown.close()
    return finish(settings, space, store, folder, cluster, results.rows_of(grid))


def announce(settings: Settings, space: Space, cluster: Cluster) -> None:
    """What will happen, in a few lines."""
    search = settings.search
    trials = f"{len(space)} trials, a full grid" if space.is_grid else f"{search.num_samples} trials, Optuna TPE"
    stopping = ", ASHA early stopping" if search.early_stopping == "asha" else ""
    say(f"Search    {', '.join(space.names)}: {trials}{stopping}; objective: {search.mode} {search.metric}")
    if space.outside and not space.is_grid:
        say(f"          the first trial keeps the config's own {', '.join(space.outside)}, outside the search space")
    if cluster.dashboard:
        say(f"Dashboard {cluster.dashboard}")


def finish(settings: Settings, space: Space, store: Store, folder: str, cluster: Cluster, rows: list[results.TrialRow]) -> str:
    """Write the table and the best adapter; the summary."""
    metric = settings.search.metric
    best = results.best_of(rows, metric, settings.search.mode)
    if best is None:
        reasons = sorted({row.error for row in rows if row.error})
        print(f"No trial ran to its end. {' '.join(reasons)[:500]}\nLogs: {folder}/tune", file=sys.stderr)
        sys.exit(1)
    chosen = results.settings_of(best, settings)
    save_adapter_folder(best.checkpoint, f"{folder}/best", chosen, reported(best.metrics), store)
    results.write_table(rows, space.names, folder)
    counts = {state: sum(row.state == state for row in rows) for state in results.STATES}
    own = rows[0].metrics.get(metric) if rows[0].state != results.FAILED else None
    lines = [
        "",
        f"Best      trial {rows.index(best) + 1} of {len(rows)}: {metric} {number(best.metrics[metric])}"
        + (f" (the config's own values: {number(own)})" if own is not None else ""),
        "Values    " + ", ".join(f"{name} {number(value)}" for name, value in best.values.items()),
        "Trials    " + ", ".join(f"{count} {state.lower()}" for state, count in counts.items() if count),
        f"Adapter   {folder}/best",
        f"Table     {folder}/trials.parquet",
        f"Curves    tensorboard --logdir {folder}/runs",
    ]
    if cluster.dashboard:
        lines.append(f"Dashboard {cluster.dashboard} (while Ray runs)")
    return "\n".join(lines)


def reported(metrics: dict[str, Any]) -> dict[str, Any]:
    """The run's own numbers out of a Tune result, which mixes them with Tune's bookkeeping."""
    names = ("step", "max_steps", "epoch", "seconds", "peak_memory", "data_wait_fraction", "train_loss")
    return {name: value for name, value in metrics.items() if name in names or name.startswith("eval_") or name.endswith("_per_second")}


class ShowTrials(tune.Callback):
    """Passes what Tune knows of the trials on to the console."""

    def __init__(self, shown: TrialTable) -> None:
        self.shown = shown

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.shown.update(trial.trial_id, state="running", **trial.config.get(POINT, trial.config))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "step" in result and not result.get("infeasible"):
            metric = self.shown.metric
            known = {"step": result["step"], "max_steps": result["max_steps"], metric: result[metric], "seconds": result["time_total_s"]}
            self.shown.update(trial.trial_id, state="running", **known)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.shown.update(trial.trial_id, state=results.state_of(trial.last_result, failed=False).lower())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error()
        self.shown.update(trial.trial_id, state="failed", error=str(error).strip().splitlines()[-1] if error else "")
