"""The sections of the report page about the trials."""

from html import escape

from vlmtune.console import format_value
from vlmtune.evaluation.verdict import BETTER, UNCLEAR, WORSE, few_rows_warning, verdict_of, verdict_text
from vlmtune.html_page import section, table, tiles
from vlmtune.search.comparison import Comparison, NoComparison, format_metric
from vlmtune.search.first_points import proposals_text
from vlmtune.search.report.answers import MODELS
from vlmtune.search.report.charts import (
    ReportTrials,
    bars,
    history,
    learning_curves,
    loss_curves,
    option_slice,
    trade_off,
)
from vlmtune.search.report.coordinates import parallel_coordinates
from vlmtune.search.report.importance import importances
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.report.training_time import format_seconds, training_seconds
from vlmtune.search.trial_results import STATES, pareto_front


def verdict(report: SearchReport) -> str:
    """What won and by how much, in a box whose colour follows the intervals of the differences."""
    trials, comparison = report.trials, report.comparison
    values = ", ".join(f"{name} {format_value(trials.best.values[name])}" for name in report.names)
    number = trials.results.index(trials.best) + 1
    best = f"The best of {len(trials.results)} trials is number {number}: {values}"
    if isinstance(comparison, NoComparison):
        head, colour = best, "unsure"
        lines = [_on_evaluation_rows(trials), f"No comparison with the base: {comparison.reason}"]
    else:
        name = comparison.metrics[0]
        verdicts = {other: verdict_of(name, gains[name]) for other, gains in comparison.gains.items()}
        found = [
            f"{word} {'from' if word == UNCLEAR else 'than'} {MODELS[other]}"
            for other, word in verdicts.items()
        ]
        head = f"By {name.replace('_', ' ')}: {'; '.join(found)}"
        lines = [f"On {comparison.summary_line()}"]
        for other, gains in comparison.gains.items():
            text = verdict_text(name, gains[name], len(comparison.rows))
            lines.append(f"Against {MODELS[other]}: {text}, a 95 % interval")
        if warning := few_rows_warning(len(comparison.rows)):
            lines.append(warning)
        lines += [best, _on_evaluation_rows(trials)]
        if trials.best is trials.baseline:
            lines.append("Searching found nothing better than the baseline (the config's values)")
        elif trials.best is trials.recipe:
            lines.append("Searching found nothing better than the recipe, which needs no search")
        words = set(verdicts.values())
        colour = "stop" if WORSE in words else "ready" if words == {BETTER} else "unsure"
    listing = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="verdict {colour}"><b>{escape(head)}</b><ul>{listing}</ul></div>'


def _on_evaluation_rows(trials: ReportTrials) -> str:
    baseline = ""
    if trials.baseline is not None:
        baseline = f", the baseline (the config's values) {format_value(trials.value(trials.baseline))}"
    if trials.recipe is not None:
        baseline += f", the recipe (no search) {format_value(trials.value(trials.recipe))}"
    best = format_value(trials.value(trials.best))
    if trials.confirmation is not None:
        baseline += f". Trained with other seeds too: {trials.confirmation}"
    return f"{trials.metric} on the evaluation rows, which the search saw: {best}{baseline}"


def headline_tiles(report: SearchReport) -> str:
    """The headline metric of each model, the number of trials, and the training time."""
    trials = report.trials.results
    boxes = []
    if isinstance(report.comparison, Comparison):
        name = report.comparison.metrics[0]
        boxes = [
            (format_metric(name, metrics[name].value), name.replace("_", " "), f"{MODELS[model]}, test rows")
            for model in MODELS
            if (metrics := report.comparison.models.get(model))
        ]
    states = [one.state for one in trials]
    counts = (f"{states.count(state)} {state.lower()}" for state in STATES if state in states)
    boxes.append((str(len(trials)), "trials", ", ".join(counts)))
    total, _, saved = training_seconds(trials)
    boxes.append((format_seconds(total), "of training", f"{format_seconds(saved)} saved by stopping early"))
    return tiles((escape(value), escape(name), escape(more)) for value, name, more in boxes)


def legend() -> str:
    """The colours of the trials."""
    kinds = [("good", "best"), ("warn", "baseline (the config's values)"), ("bar", "complete")]
    dots = "".join(f'<span><i style="background:var(--{colour})"></i>{name}</span>' for colour, name in kinds)
    stopped = '<span><i class="hollow"></i>stopped early, its last value</span>'
    return f'<p class="legend soft small">{dots}{stopped}</p>'


def history_section(report: SearchReport) -> str:
    text = f"Where their values come from: {proposals_text([one.origin for one in report.trials.results])}"
    note = f'<p class="soft small">{escape(text)}</p>'
    return section("Trials", legend(), history(report.trials), note)


def curves_section(report: SearchReport) -> str:
    curves = learning_curves(report.trials)
    title = f"Learning: {escape(report.trials.metric)} by step"
    return section(title, legend(), curves) if curves else ""


def losses_section(report: SearchReport) -> str:
    curves = loss_curves(report.trials)
    return section("Training loss by step", legend(), curves) if curves else ""


def slices_section(report: SearchReport) -> str:
    """A chart for each searched option."""
    if not report.names:
        return ""
    plots = "".join(f"<div>{option_slice(report.trials, name)}</div>" for name in report.names)
    note = f'<p class="soft small">{escape(report.trials.metric)} of every trial by each searched value</p>'
    return section("What each value did", note, f'<div class="pair">{plots}</div>')


def coordinates_section(report: SearchReport) -> str:
    plot = parallel_coordinates(report.trials, report.names)
    note = '<p class="soft small">A line for each trial, dashed if it was stopped early</p>'
    return section("All values together", note, f'<div class="scroll">{plot}</div>') if plot else ""


def trade_offs_section(report: SearchReport) -> str:
    """With several objectives: a chart of each against the first one, and the Pareto front of all."""
    trials, (metric, *more) = report.trials, report.trials.objectives
    if not more:
        return ""
    plots = "".join(f"<div>{trade_off(trials, name)}</div>" for name in more)
    rows = []
    front = pareto_front(trials.results, trials.objectives)
    for one in sorted(front, key=trials.value, reverse=trials.mode == "max"):
        numbers = "".join(f"<td>{escape(format_value(one.metrics[name]))}</td>" for name in trials.objectives)
        values = ", ".join(f"{name} {format_value(one.values[name])}" for name in report.names)
        trial = f"<td>{trials.results.index(one) + 1}</td>"
        rows.append(f'{trial}{numbers}<td class="text">{escape(values)}</td>')
    note = (
        '<p class="soft small">Complete trials. None is better than those listed in all of '
        f"{escape(', '.join(trials.objectives))}; the best adapter is the first by {escape(metric)}.</p>"
    )
    listing = table(["trial", *map(escape, trials.objectives), "values"], rows)
    return section("Trade-offs", note, f'<div class="pair">{plots}</div>', listing)


def importance_section(report: SearchReport) -> str:
    trials = report.trials
    importance = importances(trials.results, trials.curves, report.drawn, trials.metric, trials.mode)
    if importance is None:
        return ""
    shares, measured = importance
    text = f"Share of each in what made trials good, by PED-ANOVA (Optuna): {escape(measured)}"
    return section("What mattered", f'<p class="soft small">{text}</p>', bars(shares))
