"""The preflight's summary as one screen of text."""

import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest

from rich.console import Console
from rich.text import Text

from vlmtune.console import console_line
from vlmtune.data.notes import unused_line
from vlmtune.preflight.summary import RowGroups, Summary
from vlmtune.preflight.wording import (
    FORMAT_NAMES,
    counted,
    listed,
    short_source,
    verdict_words,
)

WIDTH = 100  # columns
MAX_LINES = 4  # of a long reason
BAD_KINDS = 4  # kinds of bad rows that are shown
EXAMPLE_LINES = 6
SEGMENT_ENDS = 90  # characters of a long text that are shown at either end
BAR_WIDTH = 10  # columns of the histogram's longest bar
INDENT = console_line("", "")


def console_report(summary: Summary, *, colour: bool) -> str:
    """The report: about 45 lines at most, of at most 100 columns.

    Args:
        colour: highlight the tokens that are trained on; else they are in [[ ]].
    """
    console = Console(
        width=WIDTH, force_terminal=colour, color_system="standard" if colour else None, highlight=False
    )
    with console.capture() as capture:
        for line in _data_lines(summary):
            for part in wrapped(printable(line)):
                console.print(Text(part), no_wrap=True, overflow="ellipsis")
        for text in _example(summary, console, colour):
            console.print(text, no_wrap=True, overflow="crop")
        for line in _run_lines(summary):
            _print_wrapped(console, Text(printable(line)))
        for number, line in enumerate(summary.serving):
            _print_wrapped(console, Text(printable(console_line("" if number else "Serving", line))))
        for text in _verdict(summary).split("\n"):
            _print_wrapped(console, text)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _print_wrapped(console: Console, text: Text) -> None:
    """Print a line. What does not fit into WIDTH goes below it, indented like the column of texts."""
    if len(text) <= WIDTH:
        console.print(text, no_wrap=True)
        return
    first, *rest = text.wrap(console, WIDTH)
    console.print(first, no_wrap=True)
    for line in Text(" ").join(rest).wrap(console, WIDTH - len(INDENT)):
        console.print(Text(INDENT) + line, no_wrap=True)


def printable(text: str) -> str:
    """`text` on one line, without characters that a terminal would act on."""
    return "".join(letter if letter.isprintable() else "⏎" if letter == "\n" else "�" for letter in text)


def wrapped(line: str) -> list[str]:
    """A line in parts of WIDTH columns, at most MAX_LINES of them; those after the first are indented."""
    if len(line) <= WIDTH or line.startswith(INDENT) or "█" in line:
        return [line]
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent=INDENT,
        max_lines=MAX_LINES,
        placeholder=" …",
        break_on_hyphens=False,  # so that a path can be copied
    )


def _data_lines(summary: Summary) -> Iterator[str]:
    yield console_line("Data", f"{summary.data_path}, for {summary.model}")
    images = counted(summary.images, "image")
    if summary.images:
        images += f" ({summary.different_images:,} different; {listed(summary.image_formats)})"
    formats = f"   {listed(summary.formats, FORMAT_NAMES)}" if summary.formats else ""
    rows = f"{counted(summary.rows, 'row')}, {counted(summary.turns, 'turn')}"
    yield console_line("Rows", f"{rows}, {images}{formats}")
    yield from _bad_rows(summary)
    if summary.unused:
        yield console_line("Not used", unused_line(summary.unused))
    repeats = "with the same images and texts"
    yield from _row_groups("Repeats", summary, summary.duplicates, repeats, " = ")
    conflicts = "with the same images and question, but different answers"
    yield from _row_groups("Conflicts", summary, summary.contradictions, conflicts, " ≠ ")
    if summary.sizes is not None:
        smallest, median, largest = map(
            _size, (summary.sizes.smallest, summary.sizes.median, summary.sizes.largest)
        )
        common = ", ".join(f"{_size(size)} ({count:,})" for size, count in summary.sizes.common)
        yield console_line("Sizes", f"{smallest} to {largest}, median {median}; most common {common}")
    if summary.tokens:
        yield console_line("Tokens", f"{'':<8}{'min':>8}{'median':>8}{'p95':>8}{'max':>8}")
        for name, spread in summary.tokens.items():
            label = {"row": "row", "text": "= text", "image": "+ image"}[name]
            yield f"{INDENT}{label:<8}{spread.min:>8,}{spread.median:>8,}{spread.p95:>8,}{spread.max:>8,}"
        yield from _side_by_side(_histogram(summary), _lengths(summary))


def _bad_rows(summary: Summary) -> Iterator[str]:
    kinds = summary.bad
    if not kinds:
        yield console_line("Bad rows", "none")
        return
    yield console_line("Bad rows", f"{summary.bad_rows:,} of {summary.rows + summary.bad_rows:,}")
    for kind in kinds[:BAD_KINDS]:
        same_reason = len({reason for _, reason in kind.first}) == 1
        more = "" if same_reason else f"; and {kind.count - 1:,} more of this kind"
        yield f"{kind.count:>9,} {kind.first[0][1]}{more}"
        more = f", … {kind.count - len(kind.first):,} more" if kind.count > len(kind.first) else ""
        yield f"{INDENT}  {', '.join(short_source(source, summary) for source, _ in kind.first)}{more}"
    if len(kinds) > BAD_KINDS:
        rest = sum(kind.count for kind in kinds[BAD_KINDS:])
        yield f"{rest:>9,} for {counted(len(kinds) - BAD_KINDS, 'other reason')}: see the report"


def _row_groups(label: str, summary: Summary, groups: RowGroups, shared: str, sign: str) -> Iterator[str]:
    if not groups.groups:
        yield console_line(label, "none")
        return
    yield console_line(label, f"{counted(groups.rows, 'row')} in {counted(groups.groups, 'group')} {shared}")
    first = (sign.join(short_source(source, summary) for source in group) for group in groups.first)
    yield f"{INDENT}{'; '.join(first)}"


def _size(size: str) -> str:
    return size.replace("x", "×")


def _histogram(summary: Summary) -> Iterator[str]:
    yield "tokens in a row      rows"
    largest_count = max(count for _, _, count in summary.histogram)
    for low, high, count in summary.histogram:
        yield f"{low:>6,} – {high:<6,} {count:>9,} {'█' * -(-count * BAR_WIDTH // largest_count)}"


def _lengths(summary: Summary) -> Iterator[str]:
    yield f"{'max_length':>14}{'shortened':>11}{'do not fit':>12}{'(training)':>12}"
    for length in summary.lengths:
        origin = "" if length.origin == "usual" else length.origin
        in_training = f"({length.unfit_train:,})"
        yield (
            f"{origin:<8}{length.max_length:>6,}{length.shortened:>11,}{length.unfit:>12,}{in_training:>12}"
        )
    yield f"{summary.cuts_none:,} keeps all rows whole, {summary.fits_all:,} holds all images"


def _side_by_side(left: Iterable[str], right: Iterable[str]) -> Iterator[str]:
    for left_line, right_line in zip_longest(left, right, fillvalue=""):
        yield f"{INDENT}{left_line:<40}{right_line}".rstrip()


def _example(summary: Summary, console: Console, colour: bool) -> Iterator[Text]:
    example = summary.example
    if example is None:
        return
    text = Text()
    for kind, words, tokens in example.segments:
        words = f"<{counted(tokens, 'image token')}>" if kind == "image" else _elided(printable(words))
        if kind == "answer":
            text.append(words if colour else f"[[{words}]]", style="bold black on green")
        else:
            text.append(words, style="dim" if kind != "text" else "")
    source = printable(console_line("Example", short_source(example.source, summary)))
    yield Text(f"{source}; trained on: {'highlighted' if colour else '[[ ]]'}")
    lines = text.wrap(console, WIDTH - len(INDENT))
    for line in islice(lines, EXAMPLE_LINES):
        yield Text(INDENT) + line
    if len(lines) > EXAMPLE_LINES:
        yield Text(f"{INDENT}… {len(lines) - EXAMPLE_LINES} more lines")


def _elided(words: str) -> str:
    """A long text without its middle, so that the answer is on the screen."""
    if len(words) <= 2 * SEGMENT_ENDS:
        return words
    return f"{words[:SEGMENT_ENDS]} … {words[-SEGMENT_ENDS:]}"


def _run_lines(summary: Summary) -> Iterator[str]:
    yield console_line(
        "Split", ", ".join(f"{name} {count:,}" for name, count in summary.split.items()) + " rows"
    )
    limit = "in full" if summary.max_length is None else f"at max_length {summary.max_length:,}"
    yield console_line(
        "Epoch",
        f"about {summary.epoch_tokens:,} tokens of {counted(summary.epoch_rows, 'row')} {limit}, "
        f"{summary.epoch_answer_tokens:,} of them trained on",
    )
    if summary.memory:
        yield console_line("Memory", summary.memory)
    for number, line in enumerate(summary.gpu_steps):
        yield console_line("" if number else "Steps", line)


def _verdict(summary: Summary) -> Text:
    text = Text()
    for note in summary.notes:
        text.append(printable(console_line("Note", note)) + "\n", style="yellow")
    words = verdict_words(summary)
    style = "bold red" if not summary.ready else "bold green" if words == "ready" else "bold yellow"
    return text.append(printable(console_line("Verdict", words)), style=style)
