"""Plots of a search as inline SVG: small, offline, in the colours of the page that they stand in. Each tells
its numbers on hovering."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vlmtune.console import format_value
from vlmtune.search.results import COMPLETE, TrialRow, front_of

WIDTH, HEIGHT = 520, 270  # in the plot's own units: it is as wide as its box
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
LOG_FROM = 20  # a range whose upper end is this many times its lower one is drawn on a logarithmic scale
TICKS = 5
FEW = 4  # so many different values stand side by side, each with its name


@dataclass(frozen=True)
class Scale:
    """Where values lie between the ends of an axis. `names`: of the places 0, 1, 2, ... where the values are
    no numbers."""

    low: float
    high: float
    log: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float]) -> "Scale":
        """An axis that holds these numbers, with some air at its ends."""
        low, high = min(values), max(values)
        log = low > 0 and high / low >= LOG_FROM
        if low == high:
            return cls(low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        ends = (math.log(low), math.log(high)) if log else (low, high)
        air = 0.06 * (ends[1] - ends[0])
        low, high = ends[0] - air, ends[1] + air
        return cls(math.exp(low), math.exp(high), log=True) if log else cls(low, high)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "Scale":
        return cls(-0.5, len(names) - 0.5, names=tuple(names))

    def at(self, value: float) -> float:
        """0 at the lower end, 1 at the upper one; values outside are drawn at the end."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, text) of round numbers, a handful."""
        if self.names:
            return [(float(place), name) for place, name in enumerate(self.names)]
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = next(
                (some for some in ((1, 2, 5), (1, 3), (1,)) if len(powers) * len(some) <= 2 * TICKS), (1,)
            )
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            rough = (self.high - self.low) / TICKS
            size = 10.0 ** math.floor(math.log10(rough))
            step = next(size * times for times in (1, 2, 5, 10) if size * times >= rough)
            values = [
                step * number
                for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
            ]
        return [(value, f"{value:.4g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Plot:
    """Two axes, and how a pair of values becomes a place in the picture."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str

    def place(self, x: float, y: float) -> tuple[float, float]:
        return LEFT + self.x.at(x) * (WIDTH - LEFT - RIGHT), TOP + (1 - self.y.at(y)) * (
            HEIGHT - TOP - BOTTOM
        )

    def dot(
        self, x: float, y: float, text: str, colour: str, *, hollow: bool = False, size: float = 5
    ) -> str:
        left, top = self.place(x, y)
        fill = (
            f'fill="var(--card)" stroke="var(--{colour})" stroke-width="1.5"'
            if hollow
            else f'fill="var(--{colour})"'
        )
        return (
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{size}" {fill}><title>{escape(text)}</title></circle>'
        )

    def line(
        self,
        points: Sequence[tuple[float, float]],
        text: str,
        colour: str,
        *,
        width: float = 2,
        dashed: bool = False,
    ) -> str:
        places = " ".join(f"{left:.1f},{top:.1f}" for left, top in (self.place(*point) for point in points))
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        return (
            f'<polyline points="{places}" fill="none" stroke="var(--{colour})" stroke-width="{width}"{dashes} stroke-linejoin="round">'
            f"<title>{escape(text)}</title></polyline>"
        )

    def svg(self, marks: Sequence[str]) -> str:
        """The plot with its axes; later marks lie over earlier ones."""
        lines = []
        for value, text in self.y.ticks():
            top = self.place(self.x.low, value)[1]
            lines.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}" stroke="var(--line)"/>'
                f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in self.x.ticks():
            left = self.place(value, self.y.low)[0]
            lines.append(
                f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        name = f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(self.x_name)}</text>'
        label = f"{self.y_name} by {self.x_name}"
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
            f"<title>{escape(label)}</title>{''.join(lines)}{name}{''.join(marks)}</svg>"
        )


@dataclass(frozen=True)
class Trials:
    """What the plots show: the trials in order with their curves of (step, metric), and which two of them
    matter most.

    `objectives`: the mode of each metric that the search was for. The first is the one that plots are of.
    """

    rows: list[TrialRow]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    objectives: Mapping[str, str]
    best: TrialRow
    own: TrialRow | None

    @property
    def metric(self) -> str:
        return next(iter(self.objectives))

    @property
    def mode(self) -> str:
        return self.objectives[self.metric]

    def value(self, row: TrialRow) -> float:
        """The metric of a trial's last report; NaN where there is none."""
        value = row.metrics.get(self.metric, math.nan)
        return float(value) if isinstance(value, int | float) else math.nan

    def measured(self) -> list[tuple[int, TrialRow]]:
        """(number from 1, trial) of those with a value."""
        return [(number, row) for number, row in enumerate(self.rows, 1) if math.isfinite(self.value(row))]

    def colour(self, row: TrialRow) -> str:
        if row is self.best:
            return "good"
        return "warn" if row is self.own else "bar" if row.state == COMPLETE else "soft"

    def text(self, number: int, row: TrialRow) -> str:
        values = ", ".join(f"{name} {format_value(value)}" for name, value in row.values.items())
        return f"trial {number}, {row.state.lower()} at step {row.metrics.get('step')}: {self.metric} {format_value(self.value(row))} ({values})"


def history(trials: Trials) -> str:
    """The metric of every trial in the order in which they were proposed, and the best so far of those that
    ran to their end."""
    measured = trials.measured()
    plot = Plot(
        _whole(len(trials.rows)), Scale.of([trials.value(row) for _, row in measured]), "trial", trials.metric
    )
    better = min if trials.mode == "min" else max
    steps: list[tuple[float, float]] = []
    for number, row in measured:
        if row.state == COMPLETE:
            so_far = better(steps[-1][1], trials.value(row)) if steps else trials.value(row)
            steps += [(number, steps[-1][1] if steps else so_far), (number, so_far)]
    steps.append((len(trials.rows), steps[-1][1]))
    marks = [plot.line(steps, "best so far", "bar", width=1.5)]
    return plot.svg([*marks, *_dots(plot, trials, {number: float(number) for number, _ in measured})])


def learning_curves(trials: Trials) -> str:
    """The metric by step, a line a trial, stopped ones in grey."""
    curves = {row.trial_id: points for row in trials.rows if (points := trials.curves.get(row.trial_id))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    plot = Plot(
        Scale.of([0.0, *(step for step, _ in points)]),
        Scale.of([value for _, value in points]),
        "step",
        trials.metric,
    )
    ranked = sorted(
        ((number, row) for number, row in enumerate(trials.rows, 1) if row.trial_id in curves),
        key=lambda one: ["soft", "bar", "warn", "good"].index(trials.colour(one[1])),
    )
    marks = []
    for number, row in ranked:
        curve, colour, text = curves[row.trial_id], trials.colour(row), trials.text(number, row)
        marks.append(plot.line(curve, text, colour, width=2.5 if colour in ("good", "warn") else 1.2))
        marks.append(plot.dot(*curve[-1], text, colour, hollow=row.state != COMPLETE, size=3.5))
    return plot.svg(marks)


def slice_of(trials: Trials, name: str) -> str:
    """The metric by the value of one searched option."""
    measured = [(number, row) for number, row in trials.measured() if name in row.values]
    scale, places = axis_of([row.values[name] for _, row in measured])
    plot = Plot(scale, Scale.of([trials.value(row) for _, row in measured]), name, trials.metric)
    return plot.svg(
        _dots(plot, trials, {number: place for (number, _), place in zip(measured, places, strict=True)})
    )


def axis_of(values: Sequence[Any]) -> tuple[Scale, list[float]]:
    """An axis for an option's values, and where each lies on it: numbers as they are, unless they are few;
    others side by side."""
    if len(set(map(_label, values))) > FEW and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    ):
        return Scale.of(values), [float(value) for value in values]
    numbers = all(isinstance(value, int | float) for value in values)
    names = list(dict.fromkeys(map(_label, sorted(values) if numbers else values)))
    return Scale.of_names(names), [float(names.index(_label(value))) for value in values]


def trade_off(trials: Trials, name: str) -> str:
    """The metric against another objective, of the trials that ran to their end, and the front of those that
    nothing beats in both."""
    ended = [
        (number, row)
        for number, row in trials.measured()
        if row.state == COMPLETE and math.isfinite(row.metrics.get(name, math.nan))
    ]
    if not ended:
        return ""
    scales = (
        Scale.of([row.metrics[name] for _, row in ended]),
        Scale.of([trials.value(row) for _, row in ended]),
    )
    plot = Plot(*scales, name, trials.metric)
    objectives = {trials.metric: trials.mode, name: trials.objectives[name]}
    front = sorted((row.metrics[name], trials.value(row)) for row in front_of(trials.rows, objectives))
    return plot.svg(
        [
            plot.line(front, "nothing is better in both", "good", dashed=True),
            *_dots(plot, trials, {number: float(row.metrics[name]) for number, row in ended}),
        ]
    )


def bars(shares: Mapping[str, float]) -> str:
    """Horizontal bars of shares that add to 1."""
    rows = (
        f'<div class="share"><span class="wrap">{escape(name)}</span><span class="track"><i style="width:{100 * share:.1f}%"></i></span>'
        f"<b>{100 * share:.0f} %</b></div>"
        for name, share in shares.items()
    )
    return "".join(rows)


def _dots(plot: Plot, trials: Trials, places: Mapping[int, float]) -> list[str]:
    found = [(number, row) for number, row in trials.measured() if number in places]
    found.sort(key=lambda one: (one[1] is trials.best, one[1] is trials.own, one[1].state == COMPLETE))
    return [
        plot.dot(
            places[number],
            trials.value(row),
            trials.text(number, row),
            trials.colour(row),
            hollow=row.state != COMPLETE,
        )
        for number, row in found
    ]


def _whole(count: int) -> Scale:
    return Scale(0.5, count + 0.5)


def _label(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else format_value(value)
    return text if len(text) <= 24 else f"{text[:23]}…"
