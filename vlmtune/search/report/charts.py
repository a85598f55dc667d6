"""The charts of a search's trials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from vlmtune.console import format_value
from vlmtune.search.report.plot import Plot, Scale
from vlmtune.search.trial_results import COMPLETE, TrialResult, pareto_front


@dataclass(frozen=True)
class ReportTrials:
    """What the charts show.

    Attributes:
        results: the trials in the order in which they were proposed.
        curves: (step, metric) of each report of a trial, by trial_id.
        objectives: the mode of each objective, "min" or "max"; the charts show the first one.
        best: the best trial.
        baseline: the trial of the baseline (the config's values); None if it did not complete.
        recipe: the trial of the recipe; None if it did not complete.
        confirmation: the best trial's metric over several seeds, in words; None if it was not confirmed.
        losses: (step, training loss) at each report of a trial, by trial_id.
    """

    results: Sequence[TrialResult]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    objectives: Mapping[str, str]
    best: TrialResult
    baseline: TrialResult | None
    recipe: TrialResult | None = None
    confirmation: str | None = None
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return next(iter(self.objectives))

    @property
    def mode(self) -> str:
        return self.objectives[self.metric]

    def value(self, result: TrialResult) -> float:
        """The metric of a trial's last report; NaN if it has none."""
        return result.metric(self.metric)

    def measured(self) -> list[tuple[int, TrialResult]]:
        """(number from 1, trial) of the trials with a finite metric."""
        return [(number, one) for number, one in enumerate(self.results, 1) if math.isfinite(self.value(one))]

    def colour(self, result: TrialResult) -> str:
        """The CSS variable of a trial's colour."""
        if result is self.best:
            return "good"
        if result is self.baseline:
            return "warn"
        return "bar" if result.state == COMPLETE else "soft"

    def text(self, number: int, result: TrialResult) -> str:
        """The text that appears when the mouse is over a trial."""
        values = ", ".join(f"{name} {format_value(value)}" for name, value in result.values.items())
        state = f"{result.state.lower()} at step {result.metrics.get('step')}"
        return f"trial {number}, {state}: {self.metric} {format_value(self.value(result))} ({values})"


def history(trials: ReportTrials) -> str:
    """The metric of every trial, by its number, and the best value of the complete trials up to it."""
    measured = trials.measured()
    scale = Scale.of([trials.value(one) for _, one in measured])
    plot = Plot(Scale.of_count(len(trials.results)), scale, "trial", trials.metric)
    better = min if trials.mode == "min" else max
    steps: list[tuple[float, float]] = []
    for number, one in measured:
        if one.state == COMPLETE:
            so_far = better(steps[-1][1], trials.value(one)) if steps else trials.value(one)
            steps += [(number, steps[-1][1] if steps else so_far), (number, so_far)]
    steps.append((len(trials.results), steps[-1][1]))
    marks = [plot.line(steps, "best so far", "bar", width=1.5)]
    return plot.svg([*marks, *_dots(plot, trials, {number: float(number) for number, _ in measured})])


def learning_curves(trials: ReportTrials) -> str:
    """The metric by step, see `_by_step`."""
    return _by_step(trials, trials.curves, trials.metric)


def loss_curves(trials: ReportTrials) -> str:
    """The training loss by step, see `_by_step`."""
    return _by_step(trials, trials.losses, "train_loss")


def _by_step(trials: ReportTrials, all_curves: Mapping[str, Sequence[tuple[float, float]]], name: str) -> str:
    """A plot with a line for each trial; stopped trials in gray. Empty if no trial has reported."""
    curves = {one.trial_id: points for one in trials.results if (points := all_curves.get(one.trial_id))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    steps = Scale.of([0.0, *(step for step, _ in points)])
    plot = Plot(steps, Scale.of([value for _, value in points]), "step", name)
    numbered = ((number, one) for number, one in enumerate(trials.results, 1) if one.trial_id in curves)
    marks = []
    for number, one in sorted(numbered, key=lambda pair: _layer(trials.colour(pair[1]))):
        curve, colour, text = curves[one.trial_id], trials.colour(one), trials.text(number, one)
        marks.append(plot.line(curve, text, colour, width=2.5 if colour in ("good", "warn") else 1.2))
        marks.append(plot.dot(*curve[-1], text, colour, hollow=one.state != COMPLETE, size=3.5))
    return plot.svg(marks)


def _layer(colour: str) -> int:
    """Sort key of the marks: those of the best trial and the baseline are drawn last, over the others."""
    return ("soft", "bar", "warn", "good").index(colour)


def option_slice(trials: ReportTrials, name: str) -> str:
    """A plot of the metric by the value of one searched option."""
    measured = [(number, one) for number, one in trials.measured() if name in one.values]
    scale, places = Scale.of_values([one.values[name] for _, one in measured])
    plot = Plot(scale, Scale.of([trials.value(one) for _, one in measured]), name, trials.metric)
    by_number = {number: place for (number, _), place in zip(measured, places, strict=True)}
    return plot.svg(_dots(plot, trials, by_number))


def trade_off(trials: ReportTrials, name: str) -> str:
    """The metric against another objective for the complete trials, with the Pareto front of the two."""
    complete = [
        (number, one)
        for number, one in trials.measured()
        if one.state == COMPLETE and math.isfinite(one.metric(name))
    ]
    if not complete:
        return ""
    scales = (
        Scale.of([one.metrics[name] for _, one in complete]),
        Scale.of([trials.value(one) for _, one in complete]),
    )
    plot = Plot(*scales, name, trials.metric)
    objectives = {trials.metric: trials.mode, name: trials.objectives[name]}
    front = sorted((one.metrics[name], trials.value(one)) for one in pareto_front(trials.results, objectives))
    places = {number: float(one.metrics[name]) for number, one in complete}
    line = plot.line(front, "nothing is better in both", "good", dashed=True)
    return plot.svg([line, *_dots(plot, trials, places)])


def bars(shares: Mapping[str, float]) -> str:
    """Horizontal bars of shares that add up to 1."""
    rows = (
        f'<div class="share"><span class="wrap">{escape(name)}</span>'
        f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span><b>{100 * share:.0f} %</b></div>'
        for name, share in shares.items()
    )
    return "".join(rows)


def _dots(plot: Plot, trials: ReportTrials, places: Mapping[int, float]) -> list[str]:
    """A dot for each trial.

    Args:
        places: the place of a dot on the x axis, by the trial's number.
    """
    shown = [(number, one) for number, one in trials.measured() if number in places]
    shown.sort(
        key=lambda pair: (pair[1] is trials.best, pair[1] is trials.baseline, pair[1].state == COMPLETE)
    )
    return [
        plot.dot(
            places[number],
            trials.value(one),
            trials.text(number, one),
            trials.colour(one),
            hollow=one.state != COMPLETE,
        )
        for number, one in shown
    ]
