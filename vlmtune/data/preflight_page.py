"""The preflight's summary as one HTML page that needs nothing else: style, plots and pictures are in it."""

from collections.abc import Iterable, Sequence
from html import escape

from vlmtune.data.preflight_text import FORMATS, counted, listed, shortened
from vlmtune.data.samples import Sample
from vlmtune.data.summary import Alike, Summary

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5c6675; --line: #dfe3e9; --bar: #3b6fd4;
  --good: #1f8a4c; --good-soft: #e2f4e9; --warn: #c27803; --bad: #c43a31; --bad-soft: #fbe7e5; --mark: #bfe8cd; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #98a3b3; --line: #2e3742;
  --bar: #6d9bf1; --good: #58c987; --good-soft: #17322a; --warn: #e0a83c; --bad: #f0827a; --bad-soft: #3a2123; --mark: #1f5a3a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
p { margin: 0 0 8px; } p:last-child { margin-bottom: 0; }
.soft { color: var(--soft); } .small { font-size: 13px; } .wrap { overflow-wrap: anywhere; }
.verdict { border-left: 5px solid; border-radius: 8px; padding: 12px 16px; margin: 18px 0; overflow-wrap: anywhere; }
.ready { border-color: var(--good); background: var(--good-soft); } .stop { border-color: var(--bad); background: var(--bad-soft); }
.verdict ul { margin: 4px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; } .tile b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
section { padding: 18px 20px; margin-bottom: 16px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 16px; align-items: stretch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; }
td { text-align: right; border-top: 1px solid var(--line); }
th, td { padding: 5px 8px; white-space: nowrap; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.some { color: var(--warn); font-weight: 600; } .many { color: var(--bad); font-weight: 600; }
.tag { font-size: 12px; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; color: var(--soft); margin-left: 6px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.stack { display: flex; height: 14px; border-radius: 7px; overflow: hidden; background: var(--line); margin: 6px 0 10px; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; color: var(--soft); }
.row .said { color: var(--ink); } .row mark { background: var(--mark); color: inherit; border-radius: 3px; color: var(--ink); }
.chip { border: 1px solid var(--bar); color: var(--bar); border-radius: 4px; padding: 0 5px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 230px), 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure div { display: flex; gap: 2px; background: var(--line); }
figure img { flex: 1; min-width: 0; height: 170px; object-fit: cover; display: block; }
figcaption { padding: 8px 12px 10px; font-size: 13px; overflow-wrap: anywhere; }
figcaption p { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; margin-bottom: 4px; }
@media (max-width: 500px) { main { padding: 18px 12px 32px; } section { padding: 14px; } figure img { height: 120px; } }
figcaption .assistant { color: var(--good); font-weight: 600; }
"""
PLOT = (520, 250)  # of the histogram, in its own units
CUT = 600  # characters of a text in a sample


def page(summary: Summary, samples: Sequence[Sample]) -> str:
    """The whole page."""
    title = f"Preflight of {summary.data_path}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft wrap">{escape(listed(summary.formats, FORMATS))} · for {escape(summary.model)}</p>',
        _verdict(summary),
        _tiles(summary),
        _bad(summary),
        '<div class="pair">' + _tokens(summary) + _lengths(summary) + "</div>" if summary.tokens else "",
        _example(summary),
        '<div class="pair">' + _split(summary) + _images(summary) + "</div>",
        _alike(summary),
        _gallery(summary, samples),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(filter(None, body)) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _verdict(summary: Summary) -> str:
    lines = [*summary.problems, *summary.notes]
    listing = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
    state, words = ("ready", "Ready to train") if summary.ready else ("stop", "Training cannot work yet")
    return f'<div class="verdict {state}"><b>{words}</b>{listing}</div>'


def _tiles(summary: Summary) -> str:
    tiles = [
        (summary.rows, "rows", counted(summary.turns, "turn")),
        (summary.bad_rows, "bad rows", f"in {counted(len(summary.bad), 'kind')}" if summary.bad else "nothing left out"),
        (summary.images, "images", f"{summary.different_images:,} different" if summary.images else "text only"),
        (summary.tokens["row"].median if summary.tokens else 0, "tokens in the median row", f"up to {summary.cuts_none:,}"),
        (summary.epoch_tokens, "tokens an epoch", f"{summary.epoch_answer_tokens:,} trained on"),
    ]
    cells = (f'<div class="tile"><b>{value:,}</b>{name}<div class="soft small">{more}</div></div>' for value, name, more in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(content)}</section>"


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _bad(summary: Summary) -> str:
    if not summary.bad:
        return ""
    rows = []
    for kind in summary.bad:
        first = "".join(
            f'<p class="small"><b>{escape(shortened(source, summary))}</b> <span class="soft">{escape(why)}</span></p>'
            for source, why in kind.first
        )
        head = f"<p>{escape(kind.kind)}</p>" if kind.count > 1 else ""
        rest = kind.count - len(kind.first)
        more = f'<p class="small soft">and {rest:,} more</p>' if rest else ""
        rows.append(f'<td class="text many">{kind.count:,}</td><td class="text">{head}{first}{more}</td>')
    return _section("Bad rows", _table((), rows))


def _tokens(summary: Summary) -> str:
    names = {"row": "row", "text": "of text", "image": "of images"}
    rows = (
        f"<td>{names[name]}</td><td>{of.min:,}</td><td>{of.median:,}</td><td>{of.p95:,}</td><td>{of.max:,}</td>"
        for name, of in summary.tokens.items()
    )
    return _section("Tokens in a row", _histogram(summary), _table(("", "min", "median", "p95", "max"), rows))


def _histogram(summary: Summary) -> str:
    """Bars of rows by tokens, with a line where the config cuts."""
    width, height = PLOT
    low, high = summary.histogram[0][0], summary.histogram[-1][1]
    most, step = max(count for _, _, count in summary.histogram), width / len(summary.histogram)
    marks = []
    for number, (start, stop, count) in enumerate(summary.histogram):
        size = (height - 50) * count / most
        marks.append(
            f'<rect x="{number * step + 2:.1f}" y="{height - 22 - size:.1f}" width="{step - 4:.1f}" height="{size:.1f}" rx="3" '
            f'fill="var(--bar)"><title>{start:,} to {stop:,} tokens: {count:,} rows</title></rect>'
            f'<text x="{(number + 0.5) * step:.1f}" y="{height - 27 - size:.1f}" text-anchor="middle">{_some(count)}</text>'
            f'<text x="{number * step + 2:.1f}" y="{height - 6}">{start:,}</text>'
        )
    if summary.max_length is not None and low <= summary.max_length <= high:
        x = (summary.max_length + 1 - low) / (high + 1 - low) * width
        side = 'end" dx="-4' if x > width / 2 else 'start" dx="4'
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}" stroke="var(--warn)" stroke-width="2" stroke-dasharray="4 3"/>'
            f'<text x="{x:.1f}" y="10" text-anchor="{side}">max_length {summary.max_length:,}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Rows by number of tokens">{"".join(marks)}</svg>'


def _some(count: int) -> str:
    return f"{count:,}" if count else ""


def _lengths(summary: Summary) -> str:
    rows = []
    for length in summary.lengths:
        tag = {"usual": "", "search": '<span class="tag">searched</span>', "config": '<span class="tag">this config</span>'}[length.origin]
        whole = summary.rows - length.shortened - length.unfit
        bar = _stack(((whole, "good"), (length.shortened, "warn"), (length.unfit, "bad")))
        shortened = f'<span class="{"some" if length.shortened else ""}">{length.shortened:,}</span>'
        unfit = f'<span class="{"many" if length.unfit_train else ""}">{length.unfit:,}</span>'
        if length.unfit != length.unfit_train:
            unfit += f'<div class="soft small">{length.unfit_train:,} in training</div>'
        rows.append(f"<td>{length.max_length:,}{tag}{bar}</td><td>{shortened}</td><td>{unfit}</td>")
    note = (
        f'<p class="soft small">Text is shortened, images never. {summary.cuts_none:,} cuts nothing; {summary.fits_all:,} is the smallest '
        "that holds all images. Evaluation is always at full length.</p>"
    )
    return _section("What max_length does", _table(("max_length", "shortened", "do not fit"), rows), note)


def _stack(parts: Iterable[tuple[int, str]]) -> str:
    return (
        '<div class="stack">'
        + "".join(f'<span style="flex:{count};background:var(--{colour})"></span>' for count, colour in parts if count)
        + "</div>"
    )


def _example(summary: Summary) -> str:
    example = summary.example
    if example is None:
        return ""
    words = []
    for kind, text, tokens in example.segments:
        if kind == "image":
            words.append(f'<span class="chip">{counted(tokens, "image token")}</span>')
        elif kind == "answer":
            words.append(f"<mark>{escape(text)}</mark>")
        else:
            words.append(f'<span class="said">{escape(text)}</span>' if kind == "text" else escape(text))
    place = escape(shortened(example.source, summary))
    note = f'<p class="soft small wrap">{place}; the loss is on what is highlighted, and on nothing else</p>'
    return _section("A row as the model reads it", note, f'<div class="row">{"".join(words)}</div>')


def _split(summary: Summary) -> str:
    colours = ("bar", "good", "warn")
    bar = _stack(zip(summary.split.values(), colours, strict=True))
    rows = (
        f'<td><span style="color:var(--{colour})">●</span> {name}</td><td>{count:,}</td>'
        for (name, count), colour in zip(summary.split.items(), colours, strict=True)
    )
    return _section("Split by image content", bar, _table(("", "rows"), rows))


def _images(summary: Summary) -> str:
    if summary.sizes is None:
        return ""
    sizes = summary.sizes
    rows = (f"<td>{size.replace('x', ' × ')}</td><td>{count:,}</td>" for size, count in sizes.common)
    shown = [size.replace("x", " × ") for size in (sizes.smallest, sizes.median, sizes.largest)]
    note = f'<p class="soft small">{shown[0]} to {shown[2]}, median {shown[1]}; {escape(listed(summary.image_formats))}</p>'
    return _section("Image sizes", note, _table(("pixels, most common first", "images"), rows))


def _alike(summary: Summary) -> str:
    def part(alike: Alike, what: str, sign: str) -> str:
        head = f"<p><b>{counted(alike.rows, 'row')} in {counted(alike.groups, 'group')}</b> {what}</p>"
        return head + "".join(
            f'<p class="small soft wrap">{escape(sign.join(shortened(source, summary) for source in group))}</p>' for group in alike.first
        )

    parts = []
    if summary.duplicates.groups:
        parts.append(part(summary.duplicates, "repeat each other: same images, same texts", " = "))
    if summary.contradictions.groups:
        parts.append(part(summary.contradictions, "contradict each other: same images and question, different answers", " ≠ "))
    return _section("Rows alike", *parts) if parts else ""


def _gallery(summary: Summary, samples: Sequence[Sample]) -> str:
    figures = "".join(_figure(sample, shortened(sample.source, summary)) for sample in samples)
    return _section("Samples", f'<div class="gallery">{figures}</div>') if samples else ""


def _figure(sample: Sample, source: str) -> str:
    pictures = "".join(f'<img src="{picture}" alt="">' for picture in sample.pictures)
    turns = "".join(f'<p class="{role}">{escape(text[:CUT])}</p>' for role, text in sample.turns[:4])
    place = f'<span class="soft">{escape(source)} · {sample.split} · {counted(sample.tokens, "token")}</span>'
    return f"<figure>{f'<div>{pictures}</div>' if pictures else ''}<figcaption>{turns}{place}</figcaption></figure>"
