"""Parallel coordinates: a vertical axis for each searched option and the metric, a line for each trial."""

from collections.abc import Sequence
from html import escape

from vlmtune.search.report.charts import ReportTrials
from vlmtune.search.report.plot import HEIGHT, Scale
from vlmtune.search.trial_results import COMPLETE

AXIS_DISTANCE = 240
SIDE = 70  # margin to the left of the first axis and to the right of the last one, for their texts
TOP, BOTTOM = 16, 30  # margins
HALO = 'stroke="var(--card)" stroke-width="4" paint-order="stroke"'  # keeps texts legible over lines
LAYERS = ("soft", "bar", "warn", "good")  # colours of the lines: later ones lie over earlier ones


def parallel_coordinates(trials: ReportTrials, names: Sequence[str]) -> str:
    """The plot as SVG. Complete trials have solid lines, stopped ones dashed lines.

    A trial without a finite metric has no line. The result is empty if no trial has a line.
    """
    measured = [
        (number, one) for number, one in trials.measured() if all(name in one.values for name in names)
    ]
    if not measured or not names:
        return ""
    axes = [Scale.of_values([one.values[name] for _, one in measured]) for name in names]
    values = [trials.value(one) for _, one in measured]
    axes.append((Scale.of(values), values))
    width = 2 * SIDE + AXIS_DISTANCE * len(names)
    lines = []
    for place, (number, one) in enumerate(measured):
        points = " ".join(
            f"{SIDE + AXIS_DISTANCE * axis},{_top(scale, positions[place]):.1f}"
            for axis, (scale, positions) in enumerate(axes)
        )
        colour = trials.colour(one)
        dashes = "" if one.state == COMPLETE else ' stroke-dasharray="4 4"'
        stroke_width, opacity = (2.5, 1) if colour in ("good", "warn") else (1.2, 0.7)
        style = (
            f'fill="none" stroke="var(--{colour})" stroke-width="{stroke_width}" stroke-opacity="{opacity}"'
        )
        title = f"<title>{escape(trials.text(number, one))}</title>"
        line = f'<polyline points="{points}" {style}{dashes} stroke-linejoin="round">{title}</polyline>'
        lines.append((LAYERS.index(colour), line))
    drawn = "".join(line for _, line in sorted(lines, key=lambda pair: pair[0]))
    named = zip(axes, [*names, trials.metric], strict=True)
    uprights = "".join(
        _axis(SIDE + AXIS_DISTANCE * place, scale, name) for place, ((scale, _), name) in enumerate(named)
    )
    label = escape(f"{trials.metric} and the values of each trial")
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" style="min-width:{width}px" role="img" aria-label="{label}">'
        f"<title>{label}</title>{drawn}{uprights}</svg>"
    )


def _top(scale: Scale, value: float) -> float:
    return TOP + (1 - scale.at(value)) * (HEIGHT - TOP - BOTTOM)


def _axis(left: int, scale: Scale, name: str) -> str:
    ticks = "".join(
        f'<text x="{left - 6}" y="{_top(scale, value) + 4:.1f}" text-anchor="end" {HALO}>'
        f"{escape(text)}</text>"
        for value, text in scale.ticks()
    )
    upright = f'<line x1="{left}" x2="{left}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)"/>'
    return f'{upright}{ticks}<text x="{left}" y="{HEIGHT - 8}" text-anchor="middle">{escape(name)}</text>'
