"""The report's page on made-up trials: what it says, that it needs nothing else, and that no text of the
data becomes part of it."""

import re
from dataclasses import replace

import pytest
from page_kit import Links
from search_kit import trial

from vlmtune.config.settings import Settings
from vlmtune.html_page import SORT_SCRIPT
from vlmtune.search.comparison import (
    BASE,
    BASELINE,
    BEST,
    ComparedRow,
    NoComparison,
    compare_answers,
)
from vlmtune.search.report.answers import GALLERY_ROWS
from vlmtune.search.report.charts import ReportTrials
from vlmtune.search.report.page import report_page
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.trial_results import COMPLETE, FAILED, INFEASIBLE, PRUNED, TrialResult, trials_table

PIXEL = "data:image/jpeg;base64,AAAA"


@pytest.fixture
def rows() -> list[TrialResult]:
    rates = [1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-4, 8e-4, 4e-2, 6e-2]
    states = [COMPLETE] * 3 + [PRUNED] * 5 + [FAILED, INFEASIBLE]
    return [
        trial(number, rate, state) for number, (rate, state) in enumerate(zip(rates, states, strict=True))
    ]


@pytest.fixture
def report(rows: list[TrialResult]) -> SearchReport:
    answers = [
        ComparedRow(
            row,
            f"<script>alert({row})</script>",
            "3",
            {BASE: "<img src=x>", BASELINE: "2", BEST: "3" if row % 4 else "7"},
        )
        for row in range(30)
    ]
    curves = {
        row.trial_id: [(2.0, row.metrics["eval_loss"] + 0.1), (4.0, row.metrics["eval_loss"])]
        for row in rows
        if row.metrics
    }
    return SearchReport(
        settings=Settings.from_flags({"data_path": "<b>mall</b>", "model_name_or_path": "base"}),
        trials=ReportTrials(rows, curves, {"eval_loss": "min"}, rows[1], rows[0]),
        names=["learning_rate", "lora_r", "lora_target_modules"],
        drawn=["learning_rate", "lora_r", "lora_target_modules"],
        comparison=compare_answers(answers, [str(row) for row in range(30)], 30, 0),
        images={row: [PIXEL] for row in range(30)},
        folder="/out",
        data_key="key-of-the-data",
        counts={"train": 100, "eval": 10, "test": 30},
        gpus=0,
    )


def test_the_answer_comes_first(report: SearchReport) -> None:
    text = report_page(report)
    first = text[text.index("<main>") : text.index("<section>")]
    assert "30 rows that no trial saw: exact match 0.0 % → 73.3 % (baseline: 0.0 %); off by" in first
    assert "The best of 10 trials is number 2: learning_rate 0.001, lora_r 8" in first
    assert (
        "<b>By exact match: better than the baseline (the config&#x27;s values); better than the base"
        in first
    )
    assert "Against the base alone: better (+73.3 points, +" in first
    assert "30 test rows cannot tell much" in first
    assert "3 complete, 5 pruned, 1 failed, 1 infeasible" in first
    assert first.count('class="tile"') == 5


def test_the_page_needs_nothing_but_itself_and_holds_no_markup_of_the_data(report: SearchReport) -> None:
    text = report_page(report)
    found = Links(text)
    links = [f"test_predictions.{end}" for end in ("html", "csv", "parquet")]
    assert found.targets == [*links, *[PIXEL] * GALLERY_ROWS]
    assert not {"link", "iframe", "object"} & set(found.tags)
    assert found.tags.count("script") == 1 and SORT_SCRIPT in text, "one script, which holds no data"
    assert "<b>mall" not in text and "<script>alert" not in text and "<img src=x" not in text
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_it_shows_how_the_best_was_found_and_how_to_repeat_it(report: SearchReport) -> None:
    text = report_page(report)
    assert text.count("<svg") == 2 + 3 + 1, (
        "history, curves, a slice of each searched option, and all of them together"
    )
    assert "PED-ANOVA (Optuna): eval_loss at a trial&#x27;s first evaluation, 8 trials" in text
    assert "python ray_jobs/train.py --config out/best/config.yaml --output_dir NEW_FOLDER" in text
    assert "key-of-the-data" in text and "100 train, 10 eval, 30 test" in text and "torch 2" in text
    assert "8 of 30 answers of the best adapter differ" in text


def test_examples_are_worst_first(report: SearchReport) -> None:
    said = re.findall(r'<dt>tuned</dt><dd class="(\w+)">', report_page(report))
    assert said == ["wrong"] * 8 + ["right"] * (GALLERY_ROWS - 8)


def test_without_a_comparison_it_says_why(report: SearchReport) -> None:
    text = report_page(replace(report, comparison=NoComparison("the data has no test rows"), images={}))
    assert "No comparison with the base: the data has no test rows" in text
    assert "<figure>" not in text and "Before and after" not in text


def test_the_recipe_the_confirmation_and_the_proposals_are_told(
    report: SearchReport, rows: list[TrialResult]
) -> None:
    origins = ["baseline", "recipe", *["spread"] * 4, *["tpe"] * 4]
    results = [replace(row, origin=origin) for row, origin in zip(rows, origins, strict=True)]
    confirmation = "0.11 ± 0.01 over 3 seeds; the difference to the recipe is within it"
    searched = replace(
        report.trials,
        results=results,
        best=results[2],
        baseline=results[0],
        recipe=results[1],
        confirmation=confirmation,
    )
    text = report_page(replace(report, trials=searched))
    assert "4 of 10 by TPE, 4 spread over the space, baseline and recipe" in text
    assert f"Trained with other seeds too: {confirmation}" in text
    assert "the recipe (no search) 0.1" in text
    best_is_recipe = report_page(replace(report, trials=replace(searched, best=results[1])))
    assert "Searching found nothing better than the recipe, which needs no search" in best_is_recipe


def test_an_adapter_worse_than_the_base_is_no_success(report: SearchReport) -> None:
    answers = [ComparedRow(row, "?", "3", {BASE: "3", BEST: "4"}) for row in range(5)]
    text = report_page(replace(report, comparison=compare_answers(answers, list("abcde"), 5, 0)))
    assert 'class="verdict stop"' in text and 'class="verdict ready"' in report_page(report)


@pytest.mark.parametrize(
    ("right", "colour", "word"),
    [(range(24), "ready", "better"), (range(3), "unsure", "no measurable difference")],
)
def test_the_colour_follows_the_interval(report: SearchReport, right: range, colour: str, word: str) -> None:
    answers = [
        ComparedRow(row, "?", "3", {BASE: "3" if row == 30 else "4", BEST: "3" if row in right else "4"})
        for row in range(60)
    ]
    page = report_page(
        replace(report, comparison=compare_answers(answers, [str(row) for row in range(60)], 60, 0))
    )
    assert f'class="verdict {colour}"' in page and f"Against the base alone: {word} (+" in page
    assert "cannot tell much" not in page


def test_training_loss_has_a_chart_with_a_line_for_each_trial(report: SearchReport) -> None:
    assert "Training loss by step" not in report_page(report), "nothing is known of it"
    losses = {row.trial_id: [(2.0, 0.9), (4.0, 0.5)] for row in report.trials.results[:3]}
    text = report_page(replace(report, trials=replace(report.trials, losses=losses)))
    chart = text.partition("Training loss by step")[2].partition("</section>")[0]
    assert chart.count("<polyline") == 3 and "train_loss" in chart


def test_a_search_of_one_trial_has_a_page(report: SearchReport, rows: list[TrialResult]) -> None:
    alone = ReportTrials(rows[:1], {}, {"eval_loss": "min"}, rows[0], rows[0])
    text = report_page(replace(report, trials=alone, names=["learning_rate"], drawn=["learning_rate"]))
    assert "What mattered" not in text
    assert "Searching found nothing better than the baseline (the config&#x27;s values)" in text


def test_several_objectives_show_their_trade_offs(report: SearchReport) -> None:
    trials = replace(report.trials, objectives={"eval_loss": "min", "seconds": "min"})
    text = report_page(replace(report, trials=trials))
    assert "Trade-offs" in text and 'aria-label="eval_loss by seconds"' in text
    assert text.count("<svg") == 2 + 3 + 1 + 1
    front = re.search(r"<th>trial</th>.*?</table>", text)
    assert front and front[0].count("<tr>") == 1, "all took 40 s, so the best by loss beats the others"
    assert "Trade-offs" not in report_page(report)


def test_it_says_of_which_time_it_tells_and_of_which_adapter(report: SearchReport) -> None:
    assert "GPU-hours" not in report_page(report) and "trained once more" not in report_page(report)
    for row, (start, end) in zip(report.trials.results, [(100, 140), (120, 190)], strict=False):
        row.metrics.update({"timestamp": end, "time_total_s": float(end - start)})
    settings = report.settings.replace(refit=True, trial_runner="packed")
    text = report_page(replace(report, gpus=2, settings=settings))
    assert "GPU-hours" in text and "loaded the base once for all trials" in text
    assert "from the first trial's start to the last report</td><td>90 s" in text
    assert "The best adapter was trained once more" in text
    assert re.search(r"best/config.yaml, sha256 [0-9a-f]{64}", text)


def test_it_is_dated_and_names_its_hardware_and_files(report: SearchReport) -> None:
    text = report_page(
        replace(
            report, date="2026-11-28 03:40", hardware="NVIDIA H200", gpus=1, image_names={0: ("a<b>.jpg",)}
        )
    )
    assert "2026-11-28 03:40 · NVIDIA H200 · " in text and "GPU-hours of training" in text
    assert "<h1>Search for the best adapter: " in text
    assert "a&lt;b&gt;.jpg" in text


def test_trials_have_the_names_of_the_parquet_file(report: SearchReport) -> None:
    text = report_page(report)
    listing = text[text.index("<h2>All trials</h2>") :]
    head = re.findall(r"<th>([\w ]+)</th>", listing[: listing.index("</table>")])
    columns = trials_table(report.trials.results, report.names, report.trials.objectives).column_names
    assert head == ["trial", *columns]
    assert all(f">{one.trial_id}</td>" in listing for one in report.trials.results)
    assert listing.count('<tr class="best">') == 1
