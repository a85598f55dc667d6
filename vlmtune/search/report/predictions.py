"""All test answers: as Parquet, as CSV, and as a page with a filter."""

import io
from collections.abc import Sequence
from html import escape
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from vlmtune import storage
from vlmtune.evaluation.actors import BASE
from vlmtune.evaluation.metrics import exact_match
from vlmtune.html_page import FILTER_SCRIPT, SORT_SCRIPT, document
from vlmtune.search.comparison import BASELINE, BEST, RECIPE, Comparison
from vlmtune.search.report.trial_table import STYLE as SORTABLE_STYLE

NAME = "test_predictions"
COLUMNS = {BASE: "base_answer", BASELINE: "baseline_answer", RECIPE: "recipe_answer", BEST: "answer"}
STYLE = """
main { max-width: none; }
#filter { width: 100%; padding: 8px 12px; font: inherit; border: 1px solid var(--line); border-radius: 8px;
background: var(--card); color: var(--ink); margin: 12px 0; }
td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; min-width: 80px; }
th { text-align: left; }
.right { color: var(--good); } .wrong { color: var(--bad); }
"""


def predictions_table(comparison: Comparison) -> pa.Table:
    """A row for each answered test row.

    Columns: `source`, `images` (file names, with "; " between them), `group`, `question`, `reference`,
    `answer` (of the best adapter), `base_answer` and so on, and `exact_match` of the best adapter.
    """
    rows = comparison.rows
    columns: dict[str, Sequence[Any]] = {
        "source": [row.source for row in rows],
        "images": ["; ".join(row.images) for row in rows],
        "group": [row.group for row in rows],
        "question": [row.question for row in rows],
        "reference": [row.reference for row in rows],
    }
    for model in (BEST, BASELINE, RECIPE, BASE):
        if model in rows[0].answers:
            columns[COLUMNS[model]] = [row.answers[model] for row in rows]
    columns["exact_match"] = [exact_match(row.answers[BEST], row.reference) == 1 for row in rows]
    return pa.table(columns)


def write_predictions(folder: str, comparison: Comparison) -> None:
    """Write `test_predictions.parquet`, `.csv` and `.html`."""
    table = predictions_table(comparison)
    files, inner = storage.filesystem(f"{folder}/{NAME}.parquet")
    pq.write_table(table, inner, filesystem=files)
    text = io.BytesIO()
    pacsv.write_csv(_without_formulas(table), text)
    storage.write_text(f"{folder}/{NAME}.csv", "\ufeff" + text.getvalue().decode())  # Excel needs the mark
    storage.write_text(f"{folder}/{NAME}.html", predictions_page(table))


def _without_formulas(table: pa.Table) -> pa.Table:
    """The table with a quote before texts that a spreadsheet would run."""
    columns = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        columns[name] = [
            f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value
            for value in values
        ]
    return pa.table(columns)


def predictions_page(table: pa.Table) -> str:
    """The page: a row for each answer, and a field that hides the rows without its words."""
    names = [name for name in table.column_names if name not in ("group", "exact_match")]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for row in table.to_pylist():
        kind = "right" if row["exact_match"] else "wrong"
        cells = (
            f'<td class="{kind if name == "answer" else ""}">{escape(str(row[name]))}</td>' for name in names
        )
        rows.append(f'<tr data-kind="{kind}">{"".join(cells)}</tr>')
    wrong = table.num_rows - sum(table["exact_match"].to_pylist())
    listing = f'<div class="scroll"><table class="sortable"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return document(
        "Test answers",
        [
            "<h1>Test answers</h1>",
            f'<p class="soft">{table.num_rows:,} rows, {wrong:,} answers differ from the reference. '
            "Type words to see the rows that hold them all; wrong or right shows those.</p>",
            '<input id="filter" type="search" placeholder="filter" aria-label="filter">',
            listing,
            SORT_SCRIPT,
            FILTER_SCRIPT,
        ],
        style=SORTABLE_STYLE + STYLE,
    )
