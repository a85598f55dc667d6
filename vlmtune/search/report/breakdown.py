"""Parts of the report about groups of test answers: by question, language and group, and confusions."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from html import escape

from vlmtune.data.languages import script_of
from vlmtune.evaluation.actors import BASE
from vlmtune.evaluation.answer_kinds import answer_classes
from vlmtune.evaluation.metrics import METRICS, AnsweredRow
from vlmtune.evaluation.text import normalize
from vlmtune.html_page import section, table
from vlmtune.search.comparison import BEST, ComparedRow, Comparison, format_metric

MAX_GROUPS = 15  # that one table shows; the table of all answers has the others
COMMON_ANSWERS = 10  # answers that the part about the data shows
TEXT_LENGTH = 80  # characters of a question or answer


def breakdown_section(comparison: Comparison, *, group_by: str | None) -> str:
    """The first metric of the base and the best adapter by question, language and (if given) `group_by`."""
    kinds: list[tuple[str, Callable[[ComparedRow], str]]] = [
        ("question", lambda row: row.question.strip()),
        ("language", lambda row: script_of(row.question)),
    ]
    if group_by is not None:
        kinds.append((group_by, lambda row: row.group))
    name = comparison.metrics[0]
    tables = [text for title, key in kinds if (text := _by(comparison.rows, title, key, name))]
    if not tables:
        return ""
    note = f'<p class="soft small">{escape(name.replace("_", " "))} on the test rows of each</p>'
    return section("Results by question, language and group", note, *tables)


def _by(rows: Sequence[ComparedRow], title: str, key: Callable[[ComparedRow], str], name: str) -> str:
    """A table with a line for each group; empty for a single group, or with hardly two rows in each."""
    groups: dict[str, list[ComparedRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    if len(groups) < 2 or 2 * len(groups) > len(rows):
        return ""
    shown = sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    lines = []
    for label, members in shown[:MAX_GROUPS]:
        values = "".join(f"<td>{_metric(members, model, name)}</td>" for model in (BASE, BEST))
        lines.append(f'<td class="text">{escape(label[:TEXT_LENGTH])}</td><td>{len(members)}</td>{values}')
    more = len(shown) - MAX_GROUPS
    note = f'<p class="soft small">and {more} more</p>' if more > 0 else ""
    return table([escape(title), "rows", "base", "best"], lines) + note


def _metric(rows: Sequence[ComparedRow], model: str, name: str) -> str:
    parts = [METRICS[name].parts(AnsweredRow(row.answers[model], row.reference)) for row in rows]
    numerator, denominator = (sum(values) for values in zip(*parts, strict=True))
    if not denominator:
        return ""
    return escape(format_metric(name, METRICS[name].finish(numerator / denominator)))


def confusion_section(comparison: Comparison) -> str:
    """Which answer the best adapter gives for each reference; empty if there are many or long answers."""
    classes = answer_classes([row.reference for row in comparison.rows])
    if classes is None:
        return ""
    keys = {normalize(text): place for place, text in enumerate(classes)}
    other = len(classes)
    counts = [[0] * (other + 1) for _ in classes]
    for row in comparison.rows:
        counts[keys[normalize(row.reference)]][keys.get(normalize(row.answers[BEST]), other)] += 1
    lines = []
    for place, (label, numbers) in enumerate(zip(classes, counts, strict=True)):
        cells = (
            f'<td class="{"won" if at == place else "wrong" if number else "soft"}">{number or ""}</td>'
            for at, number in enumerate(numbers)
        )
        lines.append(f"<td>{escape(label)}</td>{''.join(cells)}")
    head = ["reference", *(escape(text) for text in classes), "other"]
    note = '<p class="soft small">A line for each reference, a column for each answer of the best adapter</p>'
    return section("Confusions", note, table(head, lines))


def data_section(comparison: Comparison, counts: dict[str, int]) -> str:
    """The rows of each split, and the most common answers of the test rows."""
    rows = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    answers = Counter(row.reference.strip() for row in comparison.rows)
    total = len(comparison.rows)
    lines = [
        f'<td class="text">{escape(text[:TEXT_LENGTH])}</td><td>{count}</td>'
        f"<td>{100 * count / total:.0f} %</td>"
        for text, count in answers.most_common(COMMON_ANSWERS)
    ]
    note = (
        f'<p class="soft small">{escape(rows)} rows. {len(answers):,} different answers in the '
        f"{total:,} test rows that were answered; the most common:</p>"
    )
    return section("Data", note, table(["answer", "rows", ""], lines))
