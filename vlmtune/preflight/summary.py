"""What prepared rows are, in numbers: the content of the preflight's report, as plain values."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import ANSWER, IMAGE, TEMPLATE, TEXT
from vlmtune.data.lengths import length_problem, rows_too_long, trained_tokens
from vlmtune.data.split import EVAL, TEST, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.search.lengths import searched_max_lengths, usable_max_lengths

USUAL_LENGTHS = (256, 512, 1024, 2048)
FIRST = 5  # of rows or groups that are named
COMMON_SIZES = 3
BINS = 8
KINDS = {TEMPLATE: "template", IMAGE: "image", TEXT: "text", ANSWER: "answer"}


@dataclass(frozen=True)
class BadRows:
    """Bad rows of one kind: `first` are (source, reason) of the first ones."""

    kind: str
    count: int
    first: list[tuple[str, str]]


@dataclass(frozen=True)
class Alike:
    """Groups of rows that share something. `rows`: in all groups together; `first`: the sources of the first
    groups' first rows."""

    groups: int
    rows: int
    first: list[list[str]]


@dataclass(frozen=True)
class Sizes:
    """Image sizes as "WIDTHxHEIGHT", ordered by their pixels; `common`: the most common ones with their
    number."""

    smallest: str
    median: str
    largest: str
    common: list[tuple[str, int]]
    different: int


@dataclass(frozen=True)
class Spread:
    """Of tokens in a row. Median and p95 are a row's own number: the smallest that half, or 95 %, of the
    rows do not exceed."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Length:
    """What a `max_length` does. `origin`: usual, search or config; `unfit`: rows whose images do not fit;
    `unfit_train`: in training."""

    max_length: int
    origin: str
    shortened: int
    unfit: int
    unfit_train: int


@dataclass(frozen=True)
class ExampleRow:
    """One row as the model reads it: its segments as (template, image, text or answer; text; tokens)."""

    source: str
    segments: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Summary:
    """All that the preflight tells. `tokens`: spreads of row, text and image; `histogram`: (from, to, rows),
    both ends included."""

    data_path: str
    model: str
    formats: dict[str, int]
    rows: int
    turns: int
    images: int
    different_images: int
    image_formats: dict[str, int]
    bad_rows: int
    bad: list[BadRows]
    duplicates: Alike
    contradictions: Alike
    sizes: Sizes | None
    tokens: dict[str, Spread]
    histogram: list[tuple[int, int, int]]
    lengths: list[Length]
    max_length: int | None
    fits_all: int
    cuts_none: int
    example: ExampleRow | None
    split: dict[str, int]
    epoch_rows: int
    epoch_tokens: int
    epoch_answer_tokens: int
    notes: list[str]
    problems: list[str]
    memory: str = ""  # of a GPU that trains on these rows; empty where the model's config is not at hand

    @property
    def ready(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ready": self.ready, **asdict(self)}


def check(store: Store, settings: Settings) -> list[str]:
    """Why training on these rows cannot work with these settings, each in one line with its way out; empty
    if it can."""
    refusal = store.unusable_reason(settings.data.on_bad_row, list_rows=False)
    length = length_problem(store, settings.training.max_length, settings.data.on_long_row)
    return [problem for problem in (refusal, length) if problem is not None]


def summarise(store: Store, settings: Settings, tokenizer: Any) -> Summary:
    """The summary of a store that `find_or_make_store` gave, for a run with these settings.

    Args:
        tokenizer: the model's, to show one row as text.
    """
    facts = store.facts()
    sources = store.column("source").tolist()
    tokens, image_tokens = store.column("tokens"), store.column("image_tokens")
    sizes, hashes, formats = (
        _flat(facts.column(name).to_pylist()) for name in ("image_sizes", "image_hashes", "image_formats")
    )
    questions, contents = facts.column("question").to_pylist(), facts.column("content").to_pylist()
    answers = defaultdict(set)
    for question, content in zip(questions, contents, strict=True):
        answers[question].add(content)
    max_length, train = settings.training.max_length, store.rows_of(TRAIN)
    skipped = rows_too_long(store, max_length) if settings.data.on_long_row == "skip" else train[:0]
    kept = np.setdiff1d(train, skipped)
    notes, problems = _search(store, settings)
    if store.meta.bad_rows and settings.data.on_bad_row == "skip":
        notes.append(f"{store.meta.bad_rows} bad rows are left out")
    if len(skipped):
        notes.append(f"{len(skipped)} training rows do not fit max_length {max_length} and are left out")
    parts = {"row": tokens, "text": tokens - image_tokens, "image": image_tokens} if len(tokens) else {}
    return Summary(
        data_path=str(settings.data.data_path),
        model=settings.model.base_model,
        formats=_counted(facts.column("format").to_pylist()),
        rows=store.meta.rows,
        turns=sum(facts.column("turns").to_pylist()),
        images=len(sizes),
        different_images=len(set(hashes)),
        image_formats=_counted(formats),
        bad_rows=store.meta.bad_rows,
        bad=_bad(store.bad_rows()),
        duplicates=_alike(contents, sources, set(contents)),
        contradictions=_alike(
            questions, sources, {question for question, found in answers.items() if len(found) > 1}
        ),
        sizes=_sizes(sizes),
        tokens={name: _spread(values) for name, values in parts.items()},
        histogram=_histogram(tokens),
        lengths=_lengths(store, settings),
        max_length=max_length,
        fits_all=int(store.column("required").max(initial=0)),
        cuts_none=int(tokens.max(initial=0)),
        example=_example(store, tokenizer),
        split={name: len(store.rows_of(name)) for name in (TRAIN, EVAL, TEST)},
        epoch_rows=len(kept),
        epoch_tokens=int(np.minimum(tokens[kept], np.inf if max_length is None else max_length).sum()),
        epoch_answer_tokens=trained_tokens(store, kept, max_length),
        notes=notes,
        problems=[*check(store, settings), *problems],
    )


def _search(store: Store, settings: Settings) -> tuple[list[str], list[str]]:
    """Notes and problems of the config's search space."""
    if not store.meta.rows:
        return [], []
    try:
        return usable_max_lengths(
            store, settings.search.search_space or {}, on_long_row=settings.data.on_long_row
        )[1], []
    except DataError as error:
        return [], [str(error)]


def _flat(lists: Iterable[Sequence[str]]) -> list[str]:
    return [value for values in lists for value in values]


def _counted(values: Iterable[str]) -> dict[str, int]:
    """How often each value stands there, the most common first."""
    return dict(Counter(values).most_common())


def _bad(rows: Iterable[dict[str, str]]) -> list[BadRows]:
    counts: Counter[str] = Counter()
    first: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        counts[row["kind"]] += 1
        if len(first[row["kind"]]) < FIRST:
            first[row["kind"]].append((row["source"], row["reason"]))
    return [BadRows(kind, count, first[kind]) for kind, count in counts.most_common()]


def _alike(keys: Sequence[str], sources: Sequence[str], wanted: set[str]) -> Alike:
    """The groups of more than one row with the same key, of those wanted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, source in zip(keys, sources, strict=True):
        if key in wanted:
            groups[key].append(source)
    several = [group for group in groups.values() if len(group) > 1]
    return Alike(len(several), sum(map(len, several)), [group[:FIRST] for group in several[:FIRST]])


def _sizes(sizes: Sequence[str]) -> Sizes | None:
    if not sizes:
        return None
    counts = Counter(sizes)
    ordered = sorted(counts, key=_pixels)
    below = list(accumulate(counts[size] for size in ordered))
    median = next(size for size, count in zip(ordered, below, strict=True) if 2 * count >= len(sizes))
    return Sizes(ordered[0], median, ordered[-1], counts.most_common(COMMON_SIZES), len(counts))


def _pixels(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width * height, width


def _spread(values: np.ndarray) -> Spread:
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    return Spread(int(values.min()), int(median), int(p95), int(values.max()))


def _histogram(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(tokens):
        return []
    low, high = int(tokens.min()), int(tokens.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((tokens - low) // width)
    return [
        (low + number * width, low + (number + 1) * width - 1, int(count))
        for number, count in enumerate(counts)
    ]


def _lengths(store: Store, settings: Settings) -> list[Length]:
    """The table of lengths: the usual ones, those that a search would use, and the config's own."""
    origins = dict.fromkeys(USUAL_LENGTHS, "usual")
    origins |= {
        length: "search"
        for length in searched_max_lengths(settings.search.search_space or {})
        if length is not None
    }
    if settings.training.max_length is not None:
        origins[settings.training.max_length] = "config"
    tokens, required = store.column("tokens"), store.column("required")
    return [
        Length(
            length,
            origin,
            shortened=int(((tokens > length) & (required <= length)).sum()),
            unfit=int((required > length).sum()),
            unfit_train=len(rows_too_long(store, length)),
        )
        for length, origin in sorted(origins.items())
    ]


def _example(store: Store, tokenizer: Any) -> ExampleRow | None:
    """The row of median length among those with images; among all where there are none."""
    tokens, seeing = store.column("tokens"), store.column("image_tokens") > 0
    rows = np.flatnonzero(seeing if seeing.any() else tokens > 0)
    if not len(rows):
        return None
    row = int(rows[np.argsort(tokens[rows], kind="stable")[(len(rows) - 1) // 2]])
    example = store.read([row])[0]
    ends = np.flatnonzero(np.diff(example.kinds, append=255)) + 1
    spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
    segments = [
        (KINDS[int(example.kinds[start])], _decoded(tokenizer, example.input_ids[start:end]), end - start)
        for start, end in spans
    ]
    return ExampleRow(str(store.column("source")[row]), segments)


def _decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
