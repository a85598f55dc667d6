"""What a search found, as `vlmtune.search` returns it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.evaluation.adapter import TrainedAdapter
from vlmtune.search.comparison import Comparison, NoComparison
from vlmtune.search.trial_results import TrialResult

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What `vlmtune.search` found.

    Attributes:
        folder: absolute path or URI of the output folder.
        best: the best adapter; `best.load()` returns a PEFT model and its processor.
        best_trial: the trial that trained the best adapter.
        best_number: the number of that trial, counted from 1.
        baseline_trial: the trial of the baseline (the config's values); None if it did not complete.
        recipe_trial: the trial of the recipe, in the search or beside it; None if it did not complete.
        confirmation: the best trial's metric over several seeds, in words; None if it was not confirmed.
        metrics: the best trial's last report: `eval_loss`, `step`, `seconds`, `peak_memory` (GB of 2**30
            bytes), and others.
        trials: one row for each trial, in the order in which they were proposed. Columns: `trial_id`, every
            searched value, `origin` (where its values come from), `state` ("COMPLETE", "PRUNED", "FAILED"
            or "INFEASIBLE"), `eval_loss`, `steps`, `seconds`, `tokens_per_second`, `peak_memory` (GB), the
            other objectives, and with several objectives `pareto` (whether no other trial dominates this
            one).
        objectives: the mode of each objective, "min" or "max"; the first one decided which trial is best.
        searched: flag names of the options that varied.
        comparison: base, baseline and best adapter on test rows, or why they were not compared; None if
            `report` is off.
        refit_rows: number of rows on which the best adapter was trained once more; None without a refit.
        table_file: the Parquet file of `trials`.
        report_file: the report page; None if `report` is off.
        curves_dir: folder of the TensorBoard events of every trial.
        dashboard: address of Ray's dashboard, if it has one.
    """

    folder: str
    best: TrainedAdapter
    best_trial: TrialResult
    best_number: int
    baseline_trial: TrialResult | None
    recipe_trial: TrialResult | None
    confirmation: str | None
    metrics: Mapping[str, Any]
    trials: "pd.DataFrame"
    objectives: Mapping[str, str]
    searched: tuple[str, ...]
    comparison: Comparison | NoComparison | None
    refit_rows: int | None
    table_file: str
    report_file: str | None
    curves_dir: str
    dashboard: str | None
