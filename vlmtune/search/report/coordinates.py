"""Parallel coordinates of a search: an upright axis for each searched option and the metric, and a line
through them for each trial."""

from collections.abc import Sequence
from html import escape

from vlmtune.search.report.charts import HEIGHT, Scale, Trials, axis_of
from vlmtune.search.results import COMPLETE

APART = 240  # from axis to axis
SIDE = 70  # beside the first axis and the last, for their texts
TOP, BOTTOM = 16, 30
HALO = 'stroke="var(--card)" stroke-width="4" paint-order="stroke"'  # so that texts can be read over lines
ORDER = ("soft", "bar", "warn", "good")  # of the lines: later ones lie over earlier ones


def parallel(trials: Trials, names: Sequence[str]) -> str:
    """The plot as SVG. Trials that ran to their end are drawn through, stopped ones dashed; a trial without
    a value has no line."""
    measured = [
        (number, row) for number, row in trials.measured() if all(name in row.values for name in names)
    ]
    if not measured or not names:
        return ""
    axes = [axis_of([row.values[name] for _, row in measured]) for name in names]
    values = [trials.value(row) for _, row in measured]
    axes.append((Scale.of(values), values))
    width = 2 * SIDE + APART * len(names)
    lines = []
    for place, (_, row) in enumerate(measured):
        points = " ".join(
            f"{SIDE + APART * axis},{_top(scale, places[place]):.1f}"
            for axis, (scale, places) in enumerate(axes)
        )
        colour, dashes = trials.colour(row), "" if row.state == COMPLETE else ' stroke-dasharray="4 4"'
        strong = colour in ("good", "warn")
        text = escape(trials.text(*measured[place]))
        lines.append(
            (
                ORDER.index(colour),
                f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="{2.5 if strong else 1.2}"'
                f' stroke-opacity="{1 if strong else 0.7}"{dashes} stroke-linejoin="round"><title>{text}</title></polyline>',
            )
        )
    drawn = "".join(line for _, line in sorted(lines, key=lambda one: one[0]))
    named = zip(axes, [*names, trials.metric], strict=True)
    uprights = "".join(
        _axis(SIDE + APART * place, scale, name) for place, ((scale, _), name) in enumerate(named)
    )
    label = escape(f"{trials.metric} and the values of each trial")
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" style="min-width:{width}px" role="img" aria-label="{label}"><title>{label}</title>'
        f"{drawn}{uprights}</svg>"
    )


def _top(scale: Scale, value: float) -> float:
    return TOP + (1 - scale.at(value)) * (HEIGHT - TOP - BOTTOM)


def _axis(left: int, scale: Scale, name: str) -> str:
    ticks = "".join(
        f'<text x="{left - 6}" y="{_top(scale, value) + 4:.1f}" text-anchor="end" {HALO}>{escape(text)}</text>'
        for value, text in scale.ticks()
    )
    return (
        f'<line x1="{left}" x2="{left}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)"/>{ticks}'
        f'<text x="{left}" y="{HEIGHT - 8}" text-anchor="middle">{escape(name)}</text>'
    )
