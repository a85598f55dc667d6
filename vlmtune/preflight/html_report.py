"""The preflight's summary as one HTML page that contains its style, plots and images."""

from collections.abc import Iterable, Sequence
from html import escape

from vlmtune.data.samples import Sample
from vlmtune.html_page import document, section, table, tiles
from vlmtune.preflight.summary import RowGroups, Summary
from vlmtune.preflight.wording import FORMAT_NAMES, counted, listed, short_source, verdict_words
from vlmtune.shown_text import shown_name

STYLE = """
.some { color: var(--warn); font-weight: 600; }
.many { color: var(--bad); font-weight: 600; }
.tag {
  font-size: 12px; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; color: var(--soft);
  margin-left: 6px;
}
.stack {
  display: flex; height: 14px; border-radius: 7px; overflow: hidden; background: var(--line);
  margin: 6px 0 10px;
}
.row {
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace;
  color: var(--soft);
}
.row .said { color: var(--ink); }
.row mark { background: var(--mark); color: var(--ink); border-radius: 3px; }
.chip { border: 1px solid var(--bar); color: var(--bar); border-radius: 4px; padding: 0 5px; }
figcaption p {
  display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden;
  margin-bottom: 4px;
}
figcaption .assistant { color: var(--good); font-weight: 600; }
"""
PLOT_WIDTH, PLOT_HEIGHT = 520, 250  # of the histogram, in its own units
WIDEST_BAR = 80
AXIS_HEIGHT, LABEL_HEIGHT = 22, 28  # below and above the bars
SAMPLE_CHARACTERS = 600  # of a turn of a sample row
SAMPLE_TURNS = 4  # of a sample row


def html_report(summary: Summary, samples: Sequence[Sample]) -> str:
    """The whole page."""
    title = f"Preflight of {shown_name(summary.data_path)}"
    formats = escape(listed(summary.formats, FORMAT_NAMES))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft wrap">{formats} · for {escape(shown_name(summary.model))}</p>',
        _verdict(summary),
        _tiles(summary),
        _bad_rows(summary),
        '<div class="pair">' + _tokens(summary) + _lengths(summary) + "</div>" if summary.tokens else "",
        _example(summary),
        '<div class="pair">' + _split(summary) + _images(summary) + "</div>",
        _lines("Steps on a GPU", [*([summary.memory] if summary.memory else []), *summary.gpu_steps]),
        _lines("Serving", summary.serving),
        _row_groups(summary),
        _samples(summary, samples),
    ]
    return document(title, body, style=STYLE)


def _verdict(summary: Summary) -> str:
    lines = [*summary.problems, *summary.notes]
    listing = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
    words = verdict_words(summary).replace("ready", "Ready to train")
    state = "ready" if words == "Ready to train" else "unsure"
    if not summary.ready:
        state, words = "stop", "Training cannot work yet"
    return f'<div class="verdict {state}"><b>{escape(words)}</b>{listing}</div>'


def _lines(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return section(title, "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")


def _tiles(summary: Summary) -> str:
    median = summary.tokens["row"].median if summary.tokens else 0
    kinds = f"in {counted(len(summary.bad), 'kind')}" if summary.bad else "nothing left out"
    different = f"{summary.different_images:,} different" if summary.images else "text only"
    shown = [
        (summary.rows, "rows", counted(summary.turns, "turn")),
        (summary.bad_rows, "bad rows", kinds),
        (summary.images, "images", different),
        (median, "tokens in the median row", f"up to {summary.cuts_none:,}"),
        (summary.epoch_tokens, "tokens an epoch", f"{summary.epoch_answer_tokens:,} trained on"),
    ]
    return tiles((f"{value:,}", name, more) for value, name, more in shown)


def _bad_rows(summary: Summary) -> str:
    if not summary.bad:
        return ""
    rows = []
    for kind in summary.bad:
        first = "".join(
            f'<p class="small"><b>{escape(short_source(source, summary))}</b> '
            f'<span class="soft">{escape(reason)}</span></p>'
            for source, reason in kind.first
        )
        rest = kind.count - len(kind.first)
        more = f'<p class="small soft">and {rest:,} more</p>' if rest else ""
        rows.append(f'<td class="text many">{kind.count:,}</td><td class="text">{first}{more}</td>')
    return section("Bad rows", table((), rows))


def _tokens(summary: Summary) -> str:
    names = {"row": "row", "text": "of text", "image": "of images"}
    rows = (
        f"<td>{names[name]}</td><td>{spread.min:,}</td><td>{spread.median:,}</td>"
        f"<td>{spread.p95:,}</td><td>{spread.max:,}</td>"
        for name, spread in summary.tokens.items()
    )
    spreads = table(("", "min", "median", "p95", "max"), rows)
    return section("Tokens in a row", _histogram(summary), spreads)


def _histogram(summary: Summary) -> str:
    """Bars of rows by tokens, with a line where the config's `max_length` cuts."""
    largest_count = max(count for _, _, count in summary.histogram)
    step = PLOT_WIDTH / len(summary.histogram)
    floor = PLOT_HEIGHT - AXIS_HEIGHT
    marks = []
    for number, (first, last, count) in enumerate(summary.histogram):
        size = (floor - LABEL_HEIGHT) * count / largest_count
        width, middle = min(step - 4, WIDEST_BAR), (number + 0.5) * step
        left = middle - width / 2
        marks.append(
            f'<rect x="{left:.1f}" y="{floor - size:.1f}" width="{width:.1f}" height="{size:.1f}" rx="3" '
            f'fill="var(--bar)"><title>{first:,} to {last:,} tokens: {count:,} rows</title></rect>'
            f'<text x="{middle:.1f}" y="{floor - size - 5:.1f}" text-anchor="middle">'
            f"{f'{count:,}' if count else ''}</text>"
            f'<text x="{left:.1f}" y="{PLOT_HEIGHT - 6}">{first:,}</text>'
        )
    marks.append(_max_length_line(summary, floor))
    return (
        f'<svg viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" role="img" aria-label="Rows by number of tokens">'
        f"{''.join(marks)}</svg>"
    )


def _max_length_line(summary: Summary, floor: float) -> str:
    low, high = summary.histogram[0][0], summary.histogram[-1][1]
    if summary.max_length is None or not low <= summary.max_length <= high:
        return ""
    x = (summary.max_length + 1 - low) / (high + 1 - low) * PLOT_WIDTH
    anchor, shift = ("end", -4) if x > PLOT_WIDTH / 2 else ("start", 4)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{floor}" '
        'stroke="var(--warn)" stroke-width="2" stroke-dasharray="4 3"/>'
        f'<text x="{x:.1f}" y="10" text-anchor="{anchor}" dx="{shift}">'
        f"max_length {summary.max_length:,}</text>"
    )


def _lengths(summary: Summary) -> str:
    tags = {"usual": "", "search": "searched", "config": "this config"}
    rows = []
    for length in summary.lengths:
        tag = f'<span class="tag">{tags[length.origin]}</span>' if tags[length.origin] else ""
        whole = summary.rows - length.shortened - length.unfit
        bar = _stack(((whole, "good"), (length.shortened, "warn"), (length.unfit, "bad")))
        shortened = f'<span class="{"some" if length.shortened else ""}">{length.shortened:,}</span>'
        unfit = f'<span class="{"many" if length.unfit_train else ""}">{length.unfit:,}</span>'
        if length.unfit != length.unfit_train:
            unfit += f'<div class="soft small">{length.unfit_train:,} in training</div>'
        rows.append(f"<td>{length.max_length:,}{tag}{bar}</td><td>{shortened}</td><td>{unfit}</td>")
    note = (
        f'<p class="soft small">Text is shortened, images never. {summary.cuts_none:,} keeps all rows whole; '
        f"{summary.fits_all:,} is the smallest that holds all images. "
        "Evaluation is always at full length.</p>"
    )
    return section("What max_length does", table(("max_length", "shortened", "do not fit"), rows), note)


def _stack(parts: Iterable[tuple[int, str]]) -> str:
    """A bar of (count, colour) parts, each as wide as its count."""
    spans = (
        f'<span style="flex:{count};background:var(--{colour})"></span>' for count, colour in parts if count
    )
    return f'<div class="stack">{"".join(spans)}</div>'


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
    place = escape(short_source(example.source, summary))
    note = f'<p class="soft small wrap">{place}; the loss is on the highlighted tokens only</p>'
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
    sizes = summary.sizes
    if sizes is None:
        return ""
    smallest, median, largest = (
        size.replace("x", " × ") for size in (sizes.smallest, sizes.median, sizes.largest)
    )
    rows = (f"<td>{size.replace('x', ' × ')}</td><td>{count:,}</td>" for size, count in sizes.common)
    formats = escape(listed(summary.image_formats))
    note = f'<p class="soft small">{smallest} to {largest}, median {median}; {formats}</p>'
    return section("Image sizes", note, table(("pixels, most common first", "images"), rows))


def _row_groups(summary: Summary) -> str:
    def part(groups: RowGroups, relation: str, sign: str) -> str:
        if not groups.groups:
            return ""
        count = f"{counted(groups.rows, 'row')} in {counted(groups.groups, 'group')}"
        members = (sign.join(short_source(source, summary) for source in group) for group in groups.first)
        return f"<p><b>{count}</b> {relation}</p>" + "".join(
            f'<p class="small soft wrap">{escape(sources)}</p>' for sources in members
        )

    duplicates = part(summary.duplicates, "repeat each other: same images, same texts", " = ")
    contradictions = part(
        summary.contradictions, "contradict each other: same images and question, different answers", " ≠ "
    )
    if not duplicates and not contradictions:
        return ""
    return section("Repeated and contradicting rows", duplicates, contradictions)


def _samples(summary: Summary, samples: Sequence[Sample]) -> str:
    figures = "".join(_figure(sample, short_source(sample.source, summary)) for sample in samples)
    return section("Samples", f'<div class="gallery">{figures}</div>') if samples else ""


def _figure(sample: Sample, source: str) -> str:
    images = "".join(f'<img src="{image}" alt="">' for image in sample.images)
    turns = "".join(
        f'<p class="{role}">{escape(text[:SAMPLE_CHARACTERS])}</p>'
        for role, text in sample.turns[:SAMPLE_TURNS]
    )
    place = f'<span class="soft">{escape(source)} · {sample.split} · {counted(sample.tokens, "token")}</span>'
    gallery = f"<div>{images}</div>" if images else ""
    return f"<figure>{gallery}<figcaption>{turns}{place}</figcaption></figure>"
