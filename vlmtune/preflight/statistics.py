"""Prepared rows → the preflight's `Summary`: counts, spreads, groups, and problems."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import ANSWER, IMAGE, TEMPLATE, TEXT
from vlmtune.data.lengths import length_problem, rows_too_long, trained_tokens
from vlmtune.data.notes import note_lines
from vlmtune.data.split import EVAL, NO_EVAL_ROWS, TEST, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.preflight.summary import (
    BadRows,
    ExampleRow,
    ImageSizes,
    LengthEffect,
    RowGroups,
    Summary,
    TokenSpread,
)
from vlmtune.search.max_lengths import searched_max_lengths, usable_max_lengths

USUAL_LENGTHS = (256, 512, 1024, 2048)
FIRST = 5  # number of rows or groups that are named as examples
COMMON_SIZES = 3
HISTOGRAM_BINS = 8
KIND_NAMES = {TEMPLATE: "template", IMAGE: "image", TEXT: "text", ANSWER: "answer"}


def training_problems(store: Store, settings: Settings) -> list[str]:
    """Why training on these rows cannot work with these settings, and what to do, a line for each reason.

    Empty if training can work.
    """
    unusable = store.unusable_reason(
        settings.data.on_bad_row, settings.data.max_bad_fraction, list_rows=False
    )
    too_long = length_problem(store, settings.training.max_length, settings.data.on_long_row)
    without_eval = NO_EVAL_ROWS if unusable is None and not len(store.rows_of(EVAL)) else None
    return [problem for problem in (unusable, too_long, without_eval) if problem is not None]


def summarize(store: Store, settings: Settings, tokenizer: Any) -> Summary:
    """The summary of prepared rows, for a run with these settings.

    Args:
        store: from `cache.find_or_make_store`.
        tokenizer: the model's tokenizer, which shows one row as text.
    """
    facts = store.facts().to_pydict()
    sources = store.column("source").tolist()
    tokens, image_tokens = store.column("tokens"), store.column("image_tokens")
    hashes = _flat(facts["image_hashes"])
    max_length = settings.training.max_length
    epoch_rows, notes = _epoch_rows(store, settings)
    search_notes, search_problems = _check_search(store, settings)
    parts = {"row": tokens, "text": tokens - image_tokens, "image": image_tokens} if len(tokens) else {}
    return Summary(
        data_path=settings.data.shown_path,
        model=settings.model.base_model,
        formats=_counts(facts["format"]),
        rows=store.meta.rows,
        turns=sum(facts["turns"]),
        images=len(hashes),
        different_images=len(set(hashes)),
        image_formats=_counts(_flat(facts["image_formats"])),
        bad_rows=store.meta.bad_rows,
        bad=_bad_rows(store.bad_rows()),
        duplicates=_groups(facts["content"], sources),
        contradictions=_groups(_contradicting(facts["question"], facts["content"]), sources),
        sizes=_image_sizes(_flat(facts["image_sizes"])),
        tokens={name: _spread(values) for name, values in parts.items()},
        histogram=_histogram(tokens),
        lengths=_lengths(store, settings),
        max_length=max_length,
        fits_all=int(store.column("required").max(initial=0)),
        cuts_none=int(tokens.max(initial=0)),
        example=_example(store, tokenizer),
        split={name: len(store.rows_of(name)) for name in (TRAIN, EVAL, TEST)},
        epoch_rows=len(epoch_rows),
        epoch_tokens=int(np.minimum(tokens[epoch_rows], np.inf if max_length is None else max_length).sum()),
        epoch_answer_tokens=trained_tokens(store, epoch_rows, max_length),
        unused=store.meta.unused,
        notes=[*note_lines(store.meta.reading_notes), *search_notes, *notes],
        problems=[*training_problems(store, settings), *search_problems],
    )


def _epoch_rows(store: Store, settings: Settings) -> tuple[np.ndarray, list[str]]:
    """The rows that an epoch trains on, and notes on the rows that are left out."""
    train = store.rows_of(TRAIN)
    notes = []
    if store.meta.bad_rows and settings.data.on_bad_row == "skip":
        notes.append(f"{store.meta.bad_rows} bad rows are left out")
        if store.meta.unlabelled:
            notes.append(f"{store.meta.unlabelled} of them are frames without a row in labels.csv")
    if settings.data.on_long_row != "skip":
        return train, notes
    max_length = settings.training.max_length
    long = rows_too_long(store, max_length)
    if len(long):
        notes.append(f"{len(long)} training rows do not fit max_length {max_length} and are left out")
    return np.setdiff1d(train, long), notes


def _check_search(store: Store, settings: Settings) -> tuple[list[str], list[str]]:
    """(notes, problems) about the search space's values of `max_length`."""
    if not store.meta.rows:
        return [], []
    space = settings.search.search_space or {}
    try:
        _, notes = usable_max_lengths(store, space, on_long_row=settings.data.on_long_row)
    except DataError as error:
        return [], [str(error)]
    return notes, []


def _flat(lists: Iterable[Sequence[str]]) -> list[str]:
    return [value for values in lists for value in values]


def _counts(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, the most common first."""
    return dict(Counter(values).most_common())


def _bad_rows(rows: Iterable[dict[str, str]]) -> list[BadRows]:
    """The bad rows by kind of reason, the most common first."""
    counts: Counter[str] = Counter()
    first: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        counts[row["kind"]] += 1
        if len(first[row["kind"]]) < FIRST:
            first[row["kind"]].append((row["source"], row["reason"]))
    return [BadRows(kind, count, first[kind]) for kind, count in counts.most_common()]


def _contradicting(questions: Sequence[str], contents: Sequence[str]) -> list[str | None]:
    """The question of each row, if another row answers it differently; None for the other rows."""
    contents_of = defaultdict(set)
    for question, content in zip(questions, contents, strict=True):
        contents_of[question].add(content)
    return [question if len(contents_of[question]) > 1 else None for question in questions]


def _groups(keys: Sequence[str | None], sources: Sequence[str]) -> RowGroups:
    """Group the rows that share a key with another row; rows without a key are in no group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, source in zip(keys, sources, strict=True):
        if key is not None:
            groups[key].append(source)
    shared = [group for group in groups.values() if len(group) > 1]
    return RowGroups(len(shared), sum(map(len, shared)), [group[:FIRST] for group in shared[:FIRST]])


def _image_sizes(sizes: Sequence[str]) -> ImageSizes | None:
    if not sizes:
        return None
    counts = Counter(sizes)
    ordered = sorted(counts, key=_pixels)
    up_to = list(accumulate(counts[size] for size in ordered))  # number of images up to each size
    median = next(size for size, count in zip(ordered, up_to, strict=True) if 2 * count >= len(sizes))
    return ImageSizes(ordered[0], median, ordered[-1], counts.most_common(COMMON_SIZES), len(counts))


def _pixels(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width * height, width


def _spread(values: np.ndarray) -> TokenSpread:
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    return TokenSpread(int(values.min()), int(median), int(p95), int(values.max()))


def _histogram(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(tokens):
        return []
    low, high = int(tokens.min()), int(tokens.max())
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    counts = np.bincount((tokens - low) // width)
    return [
        (low + number * width, low + (number + 1) * width - 1, int(count))
        for number, count in enumerate(counts)
    ]


def _lengths(store: Store, settings: Settings) -> list[LengthEffect]:
    """What each value of `max_length` does: the usual ones, those of the search space, and the config's."""
    origins = dict.fromkeys(USUAL_LENGTHS, "usual")
    searched = searched_max_lengths(settings.search.search_space or {})
    origins |= {length: "search" for length in searched if length is not None}
    if settings.training.max_length is not None:
        origins[settings.training.max_length] = "config"
    tokens, required = store.column("tokens"), store.column("required")
    return [
        LengthEffect(
            length,
            origin,
            shortened=int(((tokens > length) & (required <= length)).sum()),
            unfit=int((required > length).sum()),
            unfit_train=len(rows_too_long(store, length)),
        )
        for length, origin in sorted(origins.items())
    ]


def _example(store: Store, tokenizer: Any) -> ExampleRow | None:
    """The row of median length among the rows with images, or among all rows if none has an image."""
    tokens, with_images = store.column("tokens"), store.column("image_tokens") > 0
    rows = np.flatnonzero(with_images if with_images.any() else tokens > 0)
    if not len(rows):
        return None
    row = int(rows[np.argsort(tokens[rows], kind="stable")[(len(rows) - 1) // 2]])
    example = store.read([row])[0]
    ends = (np.flatnonzero(np.diff(example.kinds, append=255)) + 1).tolist()
    segments = [
        (KIND_NAMES[int(example.kinds[start])], _decode(tokenizer, example.input_ids[start:end]), end - start)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return ExampleRow(str(store.column("source")[row]), segments)


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
