"""Write a plot as an SVG file with its own colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmtune.search.report.plot import HEIGHT, LEFT, TOP, WIDTH, Plot

COLOURS = ("#1a7f37", "#9a6700", "#0969da", "#8c959f")


def write_figure(
    file: str,
    plot: Plot,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    dots: bool = False,
) -> None:
    """Draw lines of a plot, each with its label and one of `COLOURS`.

    Args:
        lines: points (x, y) by label.
        title: text above the plot.
        dots: mark the points too.
    """
    marks = [f'<text x="{LEFT}" y="{TOP}">{title}</text>']
    for place, (label, line) in enumerate(lines.items()):
        colour = f"colour{place}"
        marks.append(plot.line(line, label, colour))
        marks += [plot.dot(x, y, f"{label}: {y:.1f} at {x:g}", colour, size=4) for x, y in line if dots]
        position = f'x="{WIDTH - 20}" y="{30 + 18 * place}" text-anchor="end"'
        marks.append(f'<text {position} fill="{COLOURS[place]}">{label}</text>')
    svg = plot.svg(marks).replace(
        "<svg ",
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="#57606a" ',
    )
    for place, colour in enumerate(COLOURS):
        svg = svg.replace(f"var(--colour{place})", colour)
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    Path(file).write_text(
        svg.replace("var(--line)", "#d0d7de").replace("</title>", f"</title>{background}", 1)
    )
