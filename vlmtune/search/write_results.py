"""Write what a search found: the best adapter, the comparison on test rows, the report page, the table."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from vlmtune import storage
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.store import Store
from vlmtune.errors import SearchFailedError, UserError
from vlmtune.evaluation.adapter import TrainedAdapter
from vlmtune.evaluation.metrics import ANSWER_METRICS
from vlmtune.search.comparison import BASELINE, RECIPE, Comparison, NoComparison, compare
from vlmtune.search.confirm import Confirmed
from vlmtune.search.failure import no_trial_completed
from vlmtune.search.first_points import recipe_values
from vlmtune.search.objectives import objectives_of
from vlmtune.search.refit import refit
from vlmtune.search.report.charts import ReportTrials
from vlmtune.search.report.page import report_page, shown_samples
from vlmtune.search.report.predictions import write_predictions
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.resolutions import IMAGE_TOKENS, image_tokens_per_row, varies_resolution
from vlmtune.search.search_result import SearchResult
from vlmtune.search.space import Space
from vlmtune.search.trial_results import (
    COMPLETE,
    Curves,
    TrialResult,
    best_trial,
    failure_reason,
    settings_of,
    trials_table,
)
from vlmtune.session import Session
from vlmtune.storage import filesystem
from vlmtune.training.best_evaluation import BEST_STEP, LAST
from vlmtune.training.save import copy_adapter, save_adapter_folder, write_card_and_metrics

logger = logging.getLogger(__name__)

LAST_ADAPTER = "last"  # folder in `best/`: the best trial's adapter after its last step, if it differs


def write_results(
    session: Session,
    space: Space,
    trials: list[TrialResult],
    curves: Curves,
    confirmed: Confirmed | None = None,
    losses: Curves | None = None,
) -> SearchResult:
    """Write `best/`, `trials.parquet` and `report.html`.

    The table comes before the comparison and the report, which take longest and can fail.

    Args:
        curves: the metric at each report of each trial.
        losses: the training loss at each report of each trial.

    Raises:
        SearchFailedError: no trial completed. The search can be resumed.
    """
    settings, folder = session.settings, session.folder
    objectives = objectives_of(settings)
    if varies_resolution(space):
        trials = [with_image_tokens(one, settings, session.store) for one in trials]
        objectives[IMAGE_TOKENS] = "min"
    best = best_trial(trials, settings.search.metric, settings.search.mode)
    if best is None:
        raise SearchFailedError(no_trial_completed(trials, settings, folder))
    if confirmed is not None:
        best = confirmed.best(trials)
    best_settings = settings_of(best, settings)
    metrics, trained_on = save_best(session, best, best_settings)
    table = trials_table(trials, space.names, objectives)
    if confirmed is not None:
        table = with_seeds(table, confirmed, trials, settings.search.metric)
    storage.write_table(table, f"{folder}/trials.parquet")
    baseline, recipe = baseline_trial(trials, space), recipe_trial(trials, space)
    confirmation = None
    if confirmed is not None:
        confirmation = confirmation_text(confirmed, best, baseline, recipe, settings.search.metric)
        metrics["confirmed"] = {
            "values": list(confirmed.values[best.trial_id]),
            "mean": confirmed.mean(best),
            "std": confirmed.spread(best),
        }
    comparison = None
    if settings.search.report:
        comparison = compare_on_test_rows(session, best_settings, best, baseline, recipe)
        if isinstance(comparison, Comparison):
            measured = {**metrics, "test": comparison.to_dict()}
            write_card_and_metrics(
                f"{folder}/best", best_settings, measured, trained_on, comparison.model_card_rows()
            )
        report_trials = ReportTrials(
            trials, curves, objectives, best, baseline, recipe, confirmation, losses or {}
        )
        write_report(session, space, best_settings, report_trials, comparison)
    return SearchResult(
        folder=folder,
        best=TrainedAdapter(f"{folder}/best", settings.model.trust_remote_code),
        best_trial=best,
        best_number=trials.index(best) + 1,
        baseline_trial=baseline,
        recipe_trial=recipe,
        confirmation=confirmation,
        metrics=metrics,
        trials=table.to_pandas(),
        objectives=objectives,
        searched=tuple(space.names),
        comparison=comparison,
        refit_rows=metrics.get("refit_rows"),
        table_file=f"{folder}/trials.parquet",
        report_file=f"{folder}/report.html" if settings.search.report else None,
        curves_dir=f"{folder}/runs",
        dashboard=session.cluster.dashboard,
    )


def confirmation_text(
    confirmed: Confirmed,
    best: TrialResult,
    baseline: TrialResult | None,
    recipe: TrialResult | None,
    metric: str,
) -> str:
    """The best trial's mean and spread over seeds, and whether baseline and recipe lie within it."""
    compared = {"baseline": baseline, "recipe": recipe}
    values = {
        name: trial.metric(metric)
        for name, trial in compared.items()
        if trial is not None and trial is not best
    }
    return confirmed.text(best, values)


def compare_on_test_rows(
    session: Session,
    best_settings: Settings,
    best: TrialResult,
    baseline: TrialResult | None,
    recipe: TrialResult | None,
) -> Comparison | NoComparison:
    """Compare the base and the adapters of the best trial, the baseline and the recipe on test rows.

    Args:
        best_settings: settings of the best trial.
    """
    candidates = {BASELINE: baseline, RECIPE: recipe if recipe is not baseline else None}
    others = {name: one for name, one in candidates.items() if one is not None and one is not best}
    adapters = {name: one.checkpoint for name, one in others.items()}
    resolutions = {name: settings_of(one, session.settings).model.resolution for name, one in others.items()}
    folder = f"{session.folder}/best"
    return compare(best_settings, session.store, session.cluster, folder, adapters, resolutions)


def save_best(session: Session, best: TrialResult, best_settings: Settings) -> tuple[dict[str, Any], Store]:
    """Write `best/`: the best trial's adapter and curves, or with `refit` those of one more training.

    Returns:
        The metrics of the best trial, and the store with the rows that the adapter was trained on.
    """
    folder, store = session.folder, session.store.at(best_settings.model.resolution)
    checkpoint, metrics, runs = best.checkpoint, own_metrics(best.metrics), f"{folder}/runs/{best.trial_id}"
    if best_settings.search.refit:
        try:
            checkpoint, store = refit(best_settings, store, folder, session.cluster)
            metrics["refit_rows"] = len(store.rows_of("train"))
            runs = f"{folder}/tune/refit/runs"
        except (UserError, TrainingFailedError, RayError) as error:  # the search has its result
            text = f"not done, the search's own adapter stays: {failure_reason(str(error))}"
            logger.info(console_line("Refit", text))
    source, inner = filesystem(runs)
    target, out = filesystem(f"{folder}/best/runs")
    target.create_dir(out, recursive=True)
    pafs.copy_files(inner, out, source_filesystem=source, destination_filesystem=target)
    save_adapter_folder(checkpoint, f"{folder}/best", best_settings, metrics, store)
    if best.last_checkpoint != best.checkpoint and "refit_rows" not in metrics:
        copy_adapter(best.last_checkpoint, f"{folder}/best/{LAST_ADAPTER}")
    return metrics, store


def write_report(
    session: Session,
    space: Space,
    best_settings: Settings,
    trials: ReportTrials,
    comparison: Comparison | NoComparison,
) -> None:
    """Write `report.html`."""
    store = session.store.at(best_settings.model.resolution)
    on_gpu = session.cluster.workers_use_gpu(best_settings.run.use_cpu)
    samples = shown_samples(comparison, store, best_settings)
    report = SearchReport(
        settings=best_settings,
        trials=trials,
        names=space.names,
        drawn=list(space.distributions),
        comparison=comparison,
        images={row: sample.images for row, sample in samples.items()},
        folder=session.folder,
        data_key=store.meta.key,
        counts={split: len(store.rows_of(split)) for split in ("train", "eval", "test")},
        gpus=best_settings.run.max_workers if on_gpu else 0,
        date=time.strftime("%Y-%m-%d %H:%M"),
        hardware=hardware(on_gpu),
        image_names={row: sample.names for row, sample in samples.items()},
    )
    if isinstance(comparison, Comparison):
        write_predictions(session.folder, comparison)
    storage.write_text(f"{session.folder}/report.html", report_page(report))


def hardware(on_gpu: bool) -> str:
    """What the search ran on: the GPU by its name if this machine has it, else the CPU."""
    import torch

    if not on_gpu:
        return f"CPU, {os.cpu_count()} cores"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPUs of the cluster"


def with_image_tokens(trial: TrialResult, settings: Settings, store: Store) -> TrialResult:
    """A trial with the image tokens of a row at its resolution among its metrics."""
    own = store.at(settings_of(trial, settings).model.resolution)
    return replace(trial, metrics={**trial.metrics, IMAGE_TOKENS: image_tokens_per_row(own)})


def baseline_trial(trials: Sequence[TrialResult], space: Space) -> TrialResult | None:
    """The trial of the baseline (the config's values); None if it did not complete."""
    # It is found by its values, because Tune may list the trials of a resumed search in another order.
    values = {**space.baseline, **space.constants}
    return next((trial for trial in trials if trial.state == COMPLETE and trial.values == values), None)


def with_seeds(table: pa.Table, confirmed: Confirmed, trials: Sequence[TrialResult], metric: str) -> pa.Table:
    """Add columns to the table of trials: mean and standard deviation over the seeds of confirmed trials."""
    confirmed_trials = [one if one.trial_id in confirmed.values else None for one in trials]
    means = [None if one is None else confirmed.mean(one) for one in confirmed_trials]
    spreads = [None if one is None else confirmed.spread(one) for one in confirmed_trials]
    table = table.append_column(f"{metric}_mean", pa.array(means, pa.float64()))
    return table.append_column(f"{metric}_std", pa.array(spreads, pa.float64()))


def recipe_trial(trials: Sequence[TrialResult], space: Space) -> TrialResult | None:
    """The trial of the recipe, in the search or beside it; None if it did not complete."""
    values = recipe_values(space)
    return next((one for one in trials if one.state == COMPLETE and one.values == values), None)


def own_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of the training run, without those that Ray Tune adds to a result."""
    names = (
        "step",
        "max_steps",
        BEST_STEP,
        "epoch",
        "seconds",
        "peak_memory",
        "data_wait_fraction",
        "train_loss",
    )
    return {
        name: value
        for name, value in metrics.items()
        if name in (*names, *ANSWER_METRICS)
        or name.startswith(("eval_", f"{LAST}eval_"))
        or name.endswith("_per_second")
    }
