"""The report's table of trials, under the names of trials.parquet and of the folders in runs/."""

from html import escape
from typing import Any

from vlmtune.console import format_value
from vlmtune.html_page import SORT_SCRIPT, section
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.trial_results import trials_table

STYLE = """
table.sortable th { cursor: pointer; user-select: none; white-space: nowrap; }
table.sortable th[data-order="1"]::after { content: " ▲"; } table.sortable th[data-order="-1"]::after {
content: " ▼"; }
tr.best td { font-weight: 600; }
"""


def trials_section(report: SearchReport) -> str:
    """A row for each trial; a click on a column's name sorts by it."""
    trials = report.trials
    rows = trials_table(trials.results, report.names, trials.objectives).to_pylist()
    losses = [one.metrics.get("train_loss") for one in trials.results]
    if any(loss is not None for loss in losses):
        rows = [{**row, "train_loss": loss} for row, loss in zip(rows, losses, strict=True)]
    columns = list(rows[0])
    head = "".join(f"<th>{escape(name)}</th>" for name in ["trial", *columns])
    body = "".join(
        f'<tr class="{"best" if one is trials.best else ""}">'
        f"{_cell(number)}{''.join(_cell(row[name]) for name in columns)}</tr>"
        for number, (row, one) in enumerate(zip(rows, trials.results, strict=True), 1)
    )
    note = (
        '<p class="soft small">trial_id is the folder of a trial in runs/ and tune/; the same table is in '
        "trials.parquet. A click on a name sorts.</p>"
    )
    listing = f'<div class="scroll"><table class="sortable"><tr>{head}</tr>{body}</table></div>'
    return section("All trials", note, listing) + SORT_SCRIPT


def _cell(value: Any) -> str:
    shown = "" if value is None else format_value(value)
    sort_key = repr(float(value)) if isinstance(value, int | float) else shown
    return f'<td data-value="{escape(sort_key)}">{escape(shown)}</td>'
