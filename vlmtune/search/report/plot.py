"""Scales and plots as inline SVG: small, offline, in the colours of the page. Hovering shows the numbers."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vlmtune.console import format_value

WIDTH, HEIGHT = 520, 270  # in the plot's own units; it is scaled to the width of its box
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40  # margins
LOG_FROM = 20  # a range whose upper end is this many times its lower end gets a logarithmic scale
TICKS = 5
FEW_VALUES = 4  # up to this many different values are placed side by side, each with its name
LABEL_LENGTH = 24  # characters of a value's name on an axis


@dataclass(frozen=True)
class Scale:
    """An axis: its ends, and whether it is logarithmic.

    `names` belong to the positions 0, 1, 2, … if the values are not numbers.
    """

    low: float
    high: float
    log: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float]) -> "Scale":
        """An axis for these numbers, with a small margin at its ends."""
        low, high = min(values), max(values)
        log = low > 0 and high / low >= LOG_FROM
        if low == high:
            return cls(low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        ends = (math.log(low), math.log(high)) if log else (low, high)
        margin = 0.06 * (ends[1] - ends[0])
        low, high = ends[0] - margin, ends[1] + margin
        return cls(math.exp(low), math.exp(high), log=True) if log else cls(low, high)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "Scale":
        return cls(-0.5, len(names) - 0.5, names=tuple(names))

    @classmethod
    def of_count(cls, count: int) -> "Scale":
        """An axis of the whole numbers from 1 to `count`."""
        return cls(0.5, count + 0.5)

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> tuple["Scale", list[float]]:
        """An axis for an option's values, and the position of each value on it.

        Numbers keep their distance if there are more than FEW_VALUES different ones. Other values stand side
        by side.
        """
        labels = list(map(_label, values))
        numeric = all(isinstance(value, int | float) for value in values)
        switches = any(isinstance(value, bool) for value in values)
        if len(set(labels)) > FEW_VALUES and numeric and not switches:
            return cls.of(values), [float(value) for value in values]
        names = list(dict.fromkeys(map(_label, sorted(values) if numeric else values)))
        return cls.of_names(names), [float(names.index(label)) for label in labels]

    def at(self, value: float) -> float:
        """The position of a value: 0 at the lower end, 1 at the upper end. Values outside are at the end."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """A handful of round numbers as (value, text), or the names."""
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
    """Two axes, and SVG marks at pairs of values."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str

    def position(self, x: float, y: float) -> tuple[float, float]:
        """(left, top) of a pair of values, in the plot's units."""
        left = LEFT + self.x.at(x) * (WIDTH - LEFT - RIGHT)
        return left, TOP + (1 - self.y.at(y)) * (HEIGHT - TOP - BOTTOM)

    def dot(
        self, x: float, y: float, text: str, colour: str, *, hollow: bool = False, size: float = 5
    ) -> str:
        """A dot whose text shows on hovering."""
        left, top = self.position(x, y)
        fill = f'fill="var(--{colour})"'
        if hollow:
            fill = f'fill="var(--card)" stroke="var(--{colour})" stroke-width="1.5"'
        title = f"<title>{escape(text)}</title>"
        return f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{size}" {fill}>{title}</circle>'

    def line(
        self,
        points: Sequence[tuple[float, float]],
        text: str,
        colour: str,
        *,
        width: float = 2,
        dashed: bool = False,
    ) -> str:
        """A line through pairs of values, whose text shows on hovering."""
        positions = (self.position(*point) for point in points)
        places = " ".join(f"{left:.1f},{top:.1f}" for left, top in positions)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        style = f'fill="none" stroke="var(--{colour})" stroke-width="{width}"{dashes} stroke-linejoin="round"'
        return f'<polyline points="{places}" {style}><title>{escape(text)}</title></polyline>'

    def svg(self, marks: Sequence[str]) -> str:
        """The plot with its axes; later marks lie over earlier ones."""
        lines = []
        for value, text in self.y.ticks():
            top = self.position(self.x.low, value)[1]
            lines.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}" stroke="var(--line)"/>'
                f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in self.x.ticks():
            left = self.position(value, self.y.low)[0]
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


def _label(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else format_value(value)
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"
