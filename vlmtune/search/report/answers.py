"""The part of a search's page about answers: how the models did on test rows, and rows to look at."""

from collections.abc import Mapping, Sequence
from html import escape

from vlmtune.evaluation.actors import BASE
from vlmtune.evaluation.metrics import METRICS, Estimate
from vlmtune.html_page import section, table
from vlmtune.search.compare import BEST, OWN, Answered, Comparison, shown, worst_first

EXAMPLES = 20
CUT = 400  # characters of a text in an example
MODELS = {BASE: "the base alone", OWN: "the config's own values", BEST: "the best adapter"}
SHORT = {BASE: "base", OWN: "config's own", BEST: "best"}  # for a table on a phone
REFIT = "The best adapter was trained once more for this, on the evaluation rows too; the plots show its trial in the search. "


def chosen(compared: Comparison, seed: int) -> list[Answered]:
    """The test rows that the page shows, the worst answers first."""
    return worst_first(compared.rows, compared.metrics, seed)[:EXAMPLES]


def before_and_after(compared: Comparison, *, refit: bool) -> str:
    """A table of the models' metrics with their intervals."""
    head = ["", *(name.replace("_", " ") for name in compared.metrics)]
    rows = [
        f"<td>{SHORT[model]}</td>"
        + "".join(_cell(name, compared.models[model].get(name), model == BEST) for name in compared.metrics)
        for model in MODELS
        if model in compared.models
    ]
    rows += [
        f"<td>best against {SHORT[other]}</td>"
        + "".join(
            f"<td>{_on_two_lines(difference(name, found[name]).replace(' points', '')) if name in found else ''}</td>"
            for name in compared.metrics
        )
        for other, found in compared.over.items()
    ]
    part = "" if len(compared.rows) == compared.total else f", drawn from {compared.total}"
    note = (
        f'<p class="soft small">{REFIT if refit else ""}'
        f"{len(compared.rows)} test rows{part}: no trial trained on them or was chosen by them. Greedy "
        "answers; exact match is of the whole text, mae the mean error of the number in it. Intervals are 95 % bootstrap intervals over "
        "pictures, those of differences paired.</p>"
    )
    return section("Before and after, on test rows", f'<div class="versus">{table(head, rows)}</div>', note)


def _cell(name: str, found: Estimate | None, won: bool) -> str:
    if found is None:
        return "<td></td>"
    interval = (
        ""
        if found.low is None or found.high is None
        else f" ({shown(name, found.low).removesuffix(' %')} to {shown(name, found.high)})"
    )
    return f"<td{' class=won' if won else ''}>{_on_two_lines(shown(name, found.value) + interval)}</td>"


def _on_two_lines(text: str) -> str:
    """A value, and the interval in brackets behind it small and below: a phone has room for three such
    columns."""
    value, _, interval = text.partition(" (")
    return escape(value) + (f'<div class="soft">{escape(interval.rstrip(")"))}</div>' if interval else "")


def difference(name: str, found: Estimate) -> str:
    """A difference with its sign, in points where it is one of shares, and its interval."""
    share = METRICS[name].share

    def text(value: float) -> str:
        return f"{100 * value:+.1f}" if share else f"{value:+.2g}"

    interval = (
        "" if found.low is None or found.high is None else f" ({text(found.low)} to {text(found.high)})"
    )
    return f"{text(found.value)}{' points' if share else ''}{interval}"


def gallery(compared: Comparison, pictures: Mapping[int, Sequence[str]], seed: int) -> str:
    """Test rows with their pictures, references and answers. `pictures`: by row of the store, as data
    URIs."""
    wrong = sum(row.answers[BEST].strip() != row.reference.strip() for row in compared.rows)
    count = f"{wrong} of {len(compared.rows)} answers of the best adapter differ from the reference"
    note = f'<p class="soft small">Worst first; {count}</p>'
    figures = "".join(_figure(row, pictures.get(row.row, ())) for row in chosen(compared, seed))
    return section("Test rows and their answers", note, f'<div class="gallery">{figures}</div>')


def _figure(row: Answered, pictures: Sequence[str]) -> str:
    images = "".join(f'<img src="{picture}" alt="">' for picture in pictures)
    said = [("reference", row.reference, "")]
    for model, name in ((BASE, "base"), (BEST, "tuned")):
        said.append(
            (
                name,
                row.answers[model],
                "right" if row.answers[model].strip() == row.reference.strip() else "wrong",
            )
        )
    answers = "".join(
        f'<dt>{name}</dt><dd class="{kind}">{escape(text[:CUT])}</dd>' for name, text, kind in said
    )
    frame = f"<div>{images}</div>" if images else ""
    return f"<figure>{frame}<figcaption><p>{escape(row.question[:CUT])}</p><dl>{answers}</dl></figcaption></figure>"
