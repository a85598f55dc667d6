"""The part of the report page about test rows: metrics of the models, and rows with their answers."""

from collections.abc import Mapping, Sequence
from html import escape

from vlmtune.evaluation.actors import BASE
from vlmtune.evaluation.metrics import MetricEstimate
from vlmtune.evaluation.verdict import format_difference
from vlmtune.html_page import section, table
from vlmtune.search.comparison import (
    BASELINE,
    BEST,
    RECIPE,
    ComparedRow,
    Comparison,
    format_metric,
    worst_first,
)

GALLERY_ROWS = 20
ANSWER_FILES = {"html": "a page", "csv": "CSV", "parquet": "Parquet"}  # beside the report, by their ending
TEXT_LENGTH = 400  # characters of a question or answer in the gallery
MODELS = {
    BASE: "the base alone",
    BASELINE: "the baseline (the config's values)",
    RECIPE: "the recipe (no search)",
    BEST: "the best adapter",
}
SHORT_NAMES = {BASE: "base", BASELINE: "baseline", RECIPE: "recipe", BEST: "best"}  # for a table on a phone
REFIT_NOTE = (
    "The best adapter was trained once more for this, on the evaluation rows too; the plots show its trial "
    "in the search. "
)


def gallery_rows(comparison: Comparison, seed: int) -> list[ComparedRow]:
    """The test rows that the page shows, the worst answers first."""
    return worst_first(comparison.rows, comparison.metrics, seed)[:GALLERY_ROWS]


def before_and_after(comparison: Comparison, *, refit: bool) -> str:
    """A table of the models' metrics and the best adapter's gains, with their intervals."""
    metrics = comparison.metrics
    head = ["", *(name.replace("_", " ") for name in metrics)]
    rows = []
    for model in MODELS:
        if model in comparison.models:
            values = comparison.models[model]
            cells = (_cell(name, values.get(name), bold=model == BEST) for name in metrics)
            rows.append(f"<td>{SHORT_NAMES[model]}</td>{''.join(cells)}")
    for other, gains in comparison.gains.items():
        texts = (format_difference(name, gains[name], unit="") if name in gains else "" for name in metrics)
        cells = (f"<td>{_on_two_lines(text.replace(', ', ' (', 1))}</td>" for text in texts)
        rows.append(f"<td>best against {SHORT_NAMES[other]}</td>{''.join(cells)}")
    drawn = "" if len(comparison.rows) == comparison.total else f", drawn from {comparison.total}"
    note = (
        f'<p class="soft small">{REFIT_NOTE if refit else ""}'
        f"{len(comparison.rows)} test rows{drawn}: no trial trained on them or was chosen by them. "
        f"Answers are greedy. exact match compares the whole text{_mae_note(comparison)}. "
        "Intervals are 95 % bootstrap intervals over images; those of differences are paired.</p>"
    )
    return section("Before and after, on test rows", f'<div class="versus">{table(head, rows)}</div>', note)


def _mae_note(comparison: Comparison) -> str:
    if "mae" not in comparison.metrics:
        return ""
    return (
        "; mae is the mean absolute error of the number in it, an answer without a number counts as 0, and "
        "number rate is the share of answers with one"
    )


def _cell(name: str, estimate: MetricEstimate | None, *, bold: bool) -> str:
    if estimate is None:
        return "<td></td>"
    text = format_metric(name, estimate.value)
    if estimate.low is not None and estimate.high is not None:
        low = format_metric(name, estimate.low).removesuffix(" %")
        text += f" ({low} to {format_metric(name, estimate.high)})"
    return f"<td{' class=won' if bold else ''}>{_on_two_lines(text)}</td>"


def _on_two_lines(text: str) -> str:
    """A value with its interval in small letters below it, so that a phone has room for three columns."""
    value, _, interval = text.partition(" (")
    return escape(value) + (f'<div class="soft">{escape(interval.rstrip(")"))}</div>' if interval else "")


def gallery(
    comparison: Comparison,
    images: Mapping[int, Sequence[str]],
    seed: int,
    names: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """Test rows with their images, references and answers.

    Args:
        images: the images as data URIs, by row of the store.
        names: the file names of the images, by row of the store.
    """
    wrong = sum(not _is_right(row, BEST) for row in comparison.rows)
    count = f"{wrong} of {len(comparison.rows)} answers of the best adapter differ from the reference"
    links = ", ".join(f'<a href="test_predictions.{end}">{word}</a>' for end, word in ANSWER_FILES.items())
    note = f'<p class="soft small">Worst first; {count}. All of them: {links}</p>'
    figures = "".join(
        _figure(row, images.get(row.row, ()), (names or {}).get(row.row, ()))
        for row in gallery_rows(comparison, seed)
    )
    return section("Test rows and their answers", note, f'<div class="gallery">{figures}</div>')


def _is_right(row: ComparedRow, model: str) -> bool:
    return row.answers[model].strip() == row.reference.strip()


def _figure(row: ComparedRow, images: Sequence[str], names: Sequence[str]) -> str:
    texts = [("reference", row.reference, "")]
    for model, name in ((BASE, "base"), (BEST, "tuned")):
        texts.append((name, row.answers[model], "right" if _is_right(row, model) else "wrong"))
    answers = "".join(
        f'<dt>{name}</dt><dd class="{kind}">{escape(text[:TEXT_LENGTH])}</dd>' for name, text, kind in texts
    )
    tags = "".join(f'<img src="{image}" alt="">' for image in images)
    frame = f"<div>{tags}</div>" if tags else ""
    place = ", ".join(names) or row.source.rpartition("/")[2]
    file = f'<div class="soft file">{escape(place[:TEXT_LENGTH])}</div>' if place else ""
    caption = f"{file}<p>{escape(row.question[:TEXT_LENGTH])}</p><dl>{answers}</dl>"
    return f"<figure>{frame}<figcaption>{caption}</figcaption></figure>"
