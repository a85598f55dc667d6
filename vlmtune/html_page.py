"""Parts of HTML pages.

A page is one self-contained file, with a light and a dark style, readable on a phone.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape

from vlmtune.shown_text import redacted

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5c6675; --line: #dfe3e9; --bar: #3b6fd4;
  --good: #1f8a4c; --good-soft: #e2f4e9; --warn: #c27803;
  --warn-soft: #fbf0dc; --bad: #c43a31; --bad-soft: #fbe7e5;
  --mark: #bfe8cd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #98a3b3; --line: #2e3742; --bar: #6d9bf1;
    --good: #58c987; --good-soft: #17322a; --warn: #e0a83c;
    --warn-soft: #332a16; --bad: #f0827a; --bad-soft: #3a2123;
    --mark: #1f5a3a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  word-break: keep-all; overflow-wrap: break-word;  /* Korean breaks between words */
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
p { margin: 0 0 8px; }
p:last-child { margin-bottom: 0; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.wrap { overflow-wrap: anywhere; }
.verdict {
  border-left: 5px solid; border-radius: 8px; padding: 12px 16px; margin: 18px 0; overflow-wrap: anywhere;
}
.ready { border-color: var(--good); background: var(--good-soft); }
.unsure { border-color: var(--warn); background: var(--warn-soft); }
.stop { border-color: var(--bad); background: var(--bad-soft); }
.verdict ul { margin: 4px 0 0; padding-left: 20px; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin-bottom: 16px;
}
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
section { padding: 18px 20px; margin-bottom: 16px; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 16px;
  align-items: stretch;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; }
td { text-align: right; border-top: 1px solid var(--line); }
th, td { padding: 5px 8px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 230px), 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure div { display: flex; gap: 2px; background: var(--line); }
figure img { flex: 1; min-width: 0; height: 170px; object-fit: cover; display: block; }
figcaption { padding: 8px 12px 10px; font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 500px) {
  main { padding: 18px 12px 32px; }
  section { padding: 14px; }
  figure img { height: 120px; }
  svg text { font-size: 17px; }  /* a chart is drawn at half its size, */
  .scroll svg text { font-size: 11px; }  /* unless it scrolls */
}
"""

# Scripts of the pages. They read what is on the page and hold no data themselves.
SORT_SCRIPT = """<script>
document.querySelectorAll("table.sortable th").forEach((head) => {
  head.tabIndex = 0;
  const sort = () => {
    const table = head.closest("table"), column = head.cellIndex;
    const order = head.dataset.order === "1" ? -1 : 1;
    table.querySelectorAll("th").forEach((other) => delete other.dataset.order);
    head.dataset.order = order;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.rows].slice(1).sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const [m, n] = [Number(x), Number(y)];
      return order * (isNaN(m) || isNaN(n) ? x.localeCompare(y) : m - n);
    });
    rows.forEach((row) => row.parentNode.appendChild(row));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
});
</script>"""
FILTER_SCRIPT = """<script>
document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
  document.querySelectorAll("tr[data-kind]").forEach((row) => {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word) || row.dataset.kind === word);
  });
});
</script>"""


def _digest(script: str) -> str:
    """The hash of a script, as a content security policy has it."""
    content = script.removeprefix("<script>").removesuffix("</script>")
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# Pages show texts of data and answers of models. If one of them were taken for HTML by mistake, this policy
# would still allow no other script than those above, and no request to a server.
CONTENT_POLICY = (
    f"default-src 'none'; script-src {_digest(SORT_SCRIPT)} {_digest(FILTER_SCRIPT)}; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)


def document(title: str, body: Iterable[str], *, style: str = "", policy: str | None = CONTENT_POLICY) -> str:
    """A whole page as HTML.

    Args:
        body: the parts as HTML; empty ones are left out.
        style: CSS rules of this page alone.
        policy: the page's content policy; None if the server that sends the page sends one itself.
    """
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n' if policy else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{meta}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n"
        "</body>\n</html>\n"
    )
    return redacted(page)


def section(title: str, *content: str) -> str:
    """A titled box. `title` and `content` are HTML."""
    return f"<section><h2>{title}</h2>{''.join(content)}</section>"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls sideways if it is too wide.

    Args:
        head: the columns' names as HTML; empty for a table without a head.
        rows: the `<td>` cells of each row.
    """
    names = "".join(f"<th>{name}</th>" for name in head)
    first = f"<tr>{names}</tr>" if names else ""
    return f'<div class="scroll"><table>{first}{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """A row of boxes, each with a large value, its name and a further line: `(value, name, line)` as HTML."""
    cells = (
        f'<div class="tile"><b>{value}</b>{name}<div class="soft small">{more}</div></div>'
        for value, name, more in values
    )
    return f'<div class="tiles">{"".join(cells)}</div>'
