"""The preflight's summary as one HTML page that needs nothing else: style, plots and pictures are in it."""

from collections.abc import Iterable, Sequence
from html import escape

from vlmtune.data.samples import Sample
from vlmtune.html_page import document, section, table, tiles
from vlmtune.preflight.console_report import FORMATS, counted, listed, shortened
from vlmtune.preflight.summary import Alike, Summary

STYLE = """
.some { color: var(--warn); font-weight: 600; } .many { color: var(--bad); font-weight: 600; }
.tag { font-size: 12px; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; color:
var(--soft); margin-left: 6px; }
.stack { display: flex; height: 14px; border-radius: 7px; overflow: hidden; background: var(--line); margin:
6px 0 10px; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; color:
var(--soft); }
.row .said { color: var(--ink); } .row mark { background: var(--mark); color: inherit; border-radius: 3px;
color: var(--ink); }
.chip { border: 1px solid var(--bar); color: var(--bar); border-radius: 4px; padding: 0 5px; }
figcaption p { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden;
margin-bottom: 4px; }
figcaption .assistant { color: var(--good); font-weight: 600; }
"""
PLOT = (520, 250)  # of the histogram, in its own units
CUT = 600  # characters of a text in a sample


def html_report(summary: Summary, samples: Sequence[Sample]) -> str:
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
    return document(title, body, style=STYLE)


def _verdict(summary: Summary) -> str:
    lines = [*summary.problems, *summary.notes]
    listing = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
    state, words = ("ready", "Ready to train") if summary.ready else ("stop", "Training cannot work yet")
    return f'<div class="verdict {state}"><b>{words}</b>{listing}</div>'


def _tiles(summary: Summary) -> str:
    shown = [
        (summary.rows, "rows", counted(summary.turns, "turn")),
        (
            summary.bad_rows,
            "bad rows",
            f"in {counted(len(summary.bad), 'kind')}" if summary.bad else "nothing left out",
        ),
        (
            summary.images,
            "images",
            f"{summary.different_images:,} different" if summary.images else "text only",
        ),
        (
            summary.tokens["row"].median if summary.tokens else 0,
            "tokens in the median row",
            f"up to {summary.cuts_none:,}",
        ),
        (summary.epoch_tokens, "tokens an epoch", f"{summary.epoch_answer_tokens:,} trained on"),
    ]
    return tiles((f"{value:,}", name, more) for value, name, more in shown)


def _bad(summary: Summary) -> str:
    if not summary.bad:
        return ""
    rows = []
    for kind in summary.bad:
        first = "".join(
            f'<p class="small"><b>{escape(shortened(source, summary))}</b> <span class="soft">{escape(why)}</span></p>'
            for source, why in kind.first
        )
        rest = kind.count - len(kind.first)
        more = f'<p class="small soft">and {rest:,} more</p>' if rest else ""
        rows.append(f'<td class="text many">{kind.count:,}</td><td class="text">{first}{more}</td>')
    return section("Bad rows", table((), rows))


def _tokens(summary: Summary) -> str:
    names = {"row": "row", "text": "of text", "image": "of images"}
    rows = (
        f"<td>{names[name]}</td><td>{of.min:,}</td><td>{of.median:,}</td><td>{of.p95:,}</td><td>{of.max:,}</td>"
        for name, of in summary.tokens.items()
    )
    return section("Tokens in a row", _histogram(summary), table(("", "min", "median", "p95", "max"), rows))


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
        tag = {
            "usual": "",
            "search": '<span class="tag">searched</span>',
            "config": '<span class="tag">this config</span>',
        }[length.origin]
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
    return section("What max_length does", table(("max_length", "shortened", "do not fit"), rows), note)


def _stack(parts: Iterable[tuple[int, str]]) -> str:
    return (
        '<div class="stack">'
        + "".join(
            f'<span style="flex:{count};background:var(--{colour})"></span>'
            for count, colour in parts
            if count
        )
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
    return section("A row as the model reads it", note, f'<div class="row">{"".join(words)}</div>')


def _split(summary: Summary) -> str:
    colours = ("bar", "good", "warn")
    bar = _stack(zip(summary.split.values(), colours, strict=True))
    rows = (
        f'<td><span style="color:var(--{colour})">●</span> {name}</td><td>{count:,}</td>'
        for (name, count), colour in zip(summary.split.items(), colours, strict=True)
    )
    return section("Split by image content", bar, table(("", "rows"), rows))


def _images(summary: Summary) -> str:
    if summary.sizes is None:
        return ""
    sizes = summary.sizes
    rows = (f"<td>{size.replace('x', ' × ')}</td><td>{count:,}</td>" for size, count in sizes.common)
    shown = [size.replace("x", " × ") for size in (sizes.smallest, sizes.median, sizes.largest)]
    note = f'<p class="soft small">{shown[0]} to {shown[2]}, median {shown[1]}; {escape(listed(summary.image_formats))}</p>'
    return section("Image sizes", note, table(("pixels, most common first", "images"), rows))


def _alike(summary: Summary) -> str:
    def part(alike: Alike, what: str, sign: str) -> str:
        head = f"<p><b>{counted(alike.rows, 'row')} in {counted(alike.groups, 'group')}</b> {what}</p>"
        return head + "".join(
            f'<p class="small soft wrap">{escape(sign.join(shortened(source, summary) for source in group))}</p>'
            for group in alike.first
        )

    parts = []
    if summary.duplicates.groups:
        parts.append(part(summary.duplicates, "repeat each other: same images, same texts", " = "))
    if summary.contradictions.groups:
        parts.append(
            part(
                summary.contradictions,
                "contradict each other: same images and question, different answers",
                " ≠ ",
            )
        )
    return section("Rows alike", *parts) if parts else ""


def _gallery(summary: Summary, samples: Sequence[Sample]) -> str:
    figures = "".join(_figure(sample, shortened(sample.source, summary)) for sample in samples)
    return section("Samples", f'<div class="gallery">{figures}</div>') if samples else ""


def _figure(sample: Sample, source: str) -> str:
    pictures = "".join(f'<img src="{picture}" alt="">' for picture in sample.images)
    turns = "".join(f'<p class="{role}">{escape(text[:CUT])}</p>' for role, text in sample.turns[:4])
    place = f'<span class="soft">{escape(source)} · {sample.split} · {counted(sample.tokens, "token")}</span>'
    return f"<figure>{f'<div>{pictures}</div>' if pictures else ''}<figcaption>{turns}{place}</figcaption></figure>"
