"""The summary of a search, on made-up trials."""

from dataclasses import replace

import pytest
from search_kit import trial

from vlmtune.evaluation.adapter import TrainedAdapter
from vlmtune.search.comparison import NoComparison
from vlmtune.search.first_points import BASELINE, RECIPE, SPREAD, TPE
from vlmtune.search.search_result import SearchResult
from vlmtune.search.summary import search_summary
from vlmtune.search.trial_results import FAILED, PRUNED, trials_table

OBJECTIVES = {"eval_loss": "min"}


@pytest.fixture
def result() -> SearchResult:
    trials = [trial(0, 2e-3), trial(1, 1e-3), trial(2, 5e-3, PRUNED), trial(3, 4e-3, FAILED)]
    origins = (BASELINE, RECIPE, SPREAD, TPE)
    trials = [replace(one, origin=origin) for one, origin in zip(trials, origins, strict=True)]
    return SearchResult(
        folder="/out",
        best=TrainedAdapter("/out/best"),
        best_trial=trials[1],
        best_number=2,
        baseline_trial=trials[0],
        recipe_trial=trials[1],
        confirmation="0.11 ± 0.01 over 3 seeds",
        metrics=trials[1].metrics,
        trials=trials_table(trials, ["learning_rate", "lora_r"], OBJECTIVES).to_pandas(),
        objectives=OBJECTIVES,
        searched=("learning_rate", "lora_r"),
        comparison=NoComparison("the data has no test rows"),
        refit_rows=42,
        table_file="/out/trials.parquet",
        report_file="/out/report.html",
        curves_dir="/out/runs",
        dashboard="http://127.0.0.1:8265",
    )


def test_every_line_of_it(result: SearchResult) -> None:
    assert search_summary(result).splitlines() == [
        "",
        "Best      trial 2 of 4: eval_loss 0.1 (baseline: 0.2, recipe: 0.1)",
        "Test      the data has no test rows",
        "Confirmed eval_loss 0.11 ± 0.01 over 3 seeds",
        "Values    learning_rate 0.001, lora_r 8",
        "Trials    2 complete, 1 pruned, 1 failed",
        "Proposals 1 of 4 by TPE, 1 spread over the space, baseline and recipe",
        "Adapter   /out/best (trained once more on the 42 rows of train and eval)",
        "Report    /out/report.html",
        "Table     /out/trials.parquet",
        "Curves    tensorboard --logdir /out/runs",
    ]


def test_what_there_is_not_has_no_line(result: SearchResult) -> None:
    short = replace(
        result,
        baseline_trial=None,
        recipe_trial=None,
        confirmation=None,
        comparison=None,
        refit_rows=None,
        report_file=None,
        dashboard=None,
    )
    lines = search_summary(short).splitlines()
    assert lines[1] == "Best      trial 2 of 4: eval_loss 0.1"
    assert [line.split()[0] for line in lines[1:]] == [
        "Best",
        "Values",
        "Trials",
        "Proposals",
        "Adapter",
        "Table",
        "Curves",
    ]
