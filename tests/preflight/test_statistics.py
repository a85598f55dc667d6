"""Every number of the preflight, on a small dataset with known faults, repeats, sizes and lengths."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_rows import BAD, GOOD, IMAGE_TOKENS, MANY_IMAGES, row_of

from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store, prepare_store
from vlmtune.data.encoded_example import required_length, shorten
from vlmtune.data.lengths import rows_too_long
from vlmtune.data.source import DataSource
from vlmtune.data.split import EVAL, TEST, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef
from vlmtune.preflight.console_report import console_report
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.statistics import summarize, training_problems
from vlmtune.preflight.summary import RowGroups, Summary

pytestmark = pytest.mark.timeout(180)


def test_rows_turns_images_and_formats(summary: Summary) -> None:
    assert (summary.rows, summary.turns) == (GOOD, 2 * GOOD)
    assert (summary.images, summary.different_images) == (20 + 2 + MANY_IMAGES, 20)
    assert summary.formats == {"jsonl": GOOD}
    assert summary.image_formats == {"JPEG": 12 + 2 + MANY_IMAGES, "PNG": 8}


def test_bad_rows_are_counted_by_reason_with_the_first_five(summary: Summary, faulty_data: Path) -> None:
    assert summary.bad_rows == BAD
    assert [(kind.kind, kind.count) for kind in summary.bad] == [
        ("image … there is no such file (paths start from … --image_root names another folder)", 6),
        ("instruction row without 'output'", 2),
        ("not JSON at column N: Expecting property name enclosed in double quotes", 1),
    ]
    assert summary.bad[0].first == [
        (
            f"{faulty_data}:{GOOD + 1 + number}",
            f"image {faulty_data.parent}/gone/{number}.jpg: there is no such file (paths start from "
            f"{faulty_data.parent}; --image_root names another folder)",
        )
        for number in range(5)
    ]


def test_repeats_and_contradictions_are_told_apart(summary: Summary, faulty_data: Path) -> None:
    assert summary.duplicates == RowGroups(1, 2, [[f"{faulty_data}:4", f"{faulty_data}:21"]])
    assert summary.contradictions == RowGroups(1, 2, [[f"{faulty_data}:5", f"{faulty_data}:22"]])


def test_image_sizes(summary: Summary) -> None:
    assert summary.sizes is not None
    assert (summary.sizes.smallest, summary.sizes.median, summary.sizes.largest) == (
        "64x48",
        "64x48",
        "100x50",
    )
    assert summary.sizes.common == [("64x48", 15 + 2 + MANY_IMAGES), ("100x50", 5)]


def test_tokens_are_text_and_images(summary: Summary, faulty_store: Store, faulty_data: Path) -> None:
    lengths = sorted(len(example.input_ids) for example in faulty_store.read(range(GOOD)))
    row, image = summary.tokens["row"], summary.tokens["image"]
    assert (row.min, row.median, row.p95, row.max) == (lengths[0], lengths[11], lengths[22], lengths[23])
    assert (image.min, image.median, image.max) == (0, IMAGE_TOKENS, MANY_IMAGES * IMAGE_TOKENS)
    long = row_of(faulty_store, faulty_data, 23)
    assert summary.tokens["text"].max == row.max == faulty_store.column("tokens")[long] == summary.cuts_none
    assert sum(count for _, _, count in summary.histogram) == GOOD
    assert all(
        count == sum(low <= length <= high for length in lengths) for low, high, count in summary.histogram
    )


def test_what_each_length_does(summary: Summary, faulty_store: Store, faulty_data: Path) -> None:
    examples = faulty_store.read(range(GOOD))
    many = row_of(faulty_store, faulty_data, 24)
    assert summary.fits_all == faulty_store.column("required")[many] > MANY_IMAGES * IMAGE_TOKENS
    assert [(length.max_length, length.origin) for length in summary.lengths] == [
        (32, "search"),
        (100, "config"),
        (256, "usual"),
        (400, "search"),
        (512, "usual"),
        (1024, "usual"),
        (2048, "usual"),
    ]
    trained = set(faulty_store.rows_of(TRAIN).tolist())
    for length in summary.lengths:
        longer = {row for row, example in enumerate(examples) if len(example.input_ids) > length.max_length}
        unfit = {row for row in longer if faulty_store.column("required")[row] > length.max_length}
        assert (length.shortened, length.unfit, length.unfit_train) == (
            len(longer - unfit),
            len(unfit),
            len(unfit & trained),
        )
    assert [length.unfit for length in summary.lengths] == [1, 1, 0, 0, 0, 0, 0]
    assert [length.shortened for length in summary.lengths][2:4] == [1, 1]


def test_split_and_tokens_of_an_epoch(summary: Summary, faulty_store: Store) -> None:
    train = faulty_store.rows_of(TRAIN)
    assert summary.split == {name: len(faulty_store.rows_of(name)) for name in (TRAIN, EVAL, TEST)}
    assert sum(summary.split.values()) == GOOD
    assert min(summary.split.values()) > 0
    examples = faulty_store.read(train.tolist())
    assert summary.epoch_tokens == sum(min(len(example.input_ids), 100) for example in examples)
    cut = [example if required_length(example) > 100 else shorten(example, 100) for example in examples]
    assert summary.epoch_answer_tokens == sum((example.labels >= 0).sum() for example in cut)


def test_the_example_highlights_the_answer_alone(summary: Summary) -> None:
    assert summary.example is not None
    kinds = [kind for kind, _, _ in summary.example.segments]
    assert kinds == ["template", "image", "template", "text", "template", "answer"]
    texts = {kind: (text, tokens) for kind, text, tokens in summary.example.segments}
    assert texts["image"][1] == IMAGE_TOKENS
    assert texts["text"][0] == "How many people?"
    assert re.fullmatch(r" ?\d+</s>", texts["answer"][0])
    assert f"[[{texts['answer'][0]}]]" in console_report(summary, colour=False)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"instruction": "What?", "output": None}], "no usable row"),
        ([{"instruction": "What?", "output": "a"}] * 3, "leave no row for train"),
    ],
)
def test_data_that_leave_nothing_to_train_on_are_reported(
    tmp_path: Path, models: Path, ray_cluster: None, rows: list[dict[str, Any]], problem: str
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data_path": str(tmp_path / "d.jsonl"),
        "model_name_or_path": str(models / "llava"),
        "on_bad_row": "skip",
        "max_bad_fraction": 0.9,
    }
    settings = Settings.from_flags(values)
    found = summarize(
        find_or_make_store(DataSource.from_settings(settings), str(tmp_path / "cache")),
        settings,
        ModelRef(str(models / "llava")).processor().tokenizer,
    )
    assert not found.ready
    assert problem in found.problems[0]
    assert problem in re.sub(r"\s+", " ", console_report(found, colour=False))
    assert "cannot work" in html_report(found, [])
    with pytest.raises(DataError, match=problem):
        prepare_store(DataSource.from_settings(settings), str(tmp_path / "cache"))


def test_training_rows_that_do_not_fit_are_a_problem_unless_skipped(
    faulty_store: Store, configure: Callable[..., Settings]
) -> None:
    train, required = faulty_store.rows_of(TRAIN), faulty_store.column("required")
    enough = int(required[train].max())
    assert (
        training_problems(faulty_store, configure(on_bad_row="skip", max_bad_fraction=0.9, max_length=enough))
        == []
    )
    assert len(rows_too_long(faulty_store, enough)) == len(rows_too_long(faulty_store, None)) == 0
    short = enough - 1
    long = rows_too_long(faulty_store, short).tolist()
    assert long == [row for row in train if required[row] > short] != []
    (problem,) = training_problems(
        faulty_store, configure(on_bad_row="skip", max_bad_fraction=0.9, max_length=short)
    )
    assert f"max_length {short} " in problem
    assert f"{enough} keeps a word of each answer" in problem
    skipping = configure(on_bad_row="skip", max_bad_fraction=0.9, on_long_row="skip", max_length=short)
    assert training_problems(faulty_store, skipping) == []
    problems = training_problems(faulty_store, configure(max_length=enough))
    assert f"{BAD} of {GOOD + BAD} rows are bad" in problems[0]


def test_no_row_to_evaluate_on_is_a_problem(
    faulty_store: Store, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of = Store.rows_of
    monkeypatch.setattr(
        Store, "rows_of", lambda store, name: rows_of(store, name)[: 0 if name == "eval" else None]
    )
    settings = configure(on_bad_row="skip", max_bad_fraction=0.9, max_length=None)
    (problem,) = training_problems(faulty_store, settings)
    assert "--eval_fraction 0 leaves no row to evaluate on" in problem
