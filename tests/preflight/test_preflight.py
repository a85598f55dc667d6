"""Every number of the preflight, on a small data set with known faults, repeats, sizes and lengths; and the
checks before training."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from page_kit import Links
from PIL import Image

from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store, prepare_store
from vlmtune.data.encoded_example import required_length, shorten
from vlmtune.data.facts import error_kind
from vlmtune.data.lengths import rows_too_long, trained_tokens
from vlmtune.data.samples import pick_samples
from vlmtune.data.source import DataSource
from vlmtune.data.split import EVAL, TEST, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef
from vlmtune.preflight.console_report import WIDTH, console_report
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.summary import Alike, Summary, check, summarise
from vlmtune.search.lengths import searched_max_lengths, usable_max_lengths

pytestmark = pytest.mark.timeout(180)

IMAGE_TOKENS = 16  # of the tiny LLaVA
GOOD, BAD = 24, 9
MANY = 6  # images of the last good row


def write_data(folder: Path) -> Path:
    """24 good rows, then bad ones: 6 that miss their image, 2 without an answer, 1 that is no JSON."""
    for number in range(20):
        size = (64, 48) if number < 15 else (100, 50)
        Image.new("RGB", size, (number * 12, 40, 90)).save(
            folder / f"{number}.{'jpg' if number < 12 else 'png'}"
        )
    rows: list[dict[str, Any]] = [
        {
            "image": f"{number}.{'jpg' if number < 12 else 'png'}",
            "instruction": "How many people?",
            "output": str(number),
        }
        for number in range(20)
    ]
    rows.append({**rows[3], "instruction": "How  many people?"})  # repeats row 4 but for a space
    rows.append({**rows[4], "output": "nobody at all"})  # contradicts row 5
    rows.append({"instruction": "word " * 500, "output": "a long question"})
    rows.append({"images": ["0.jpg"] * MANY, "instruction": "Which are alike?", "output": "all"})
    rows += [
        {"image": f"gone/{number}.jpg", "instruction": "What?", "output": "nothing"} for number in range(6)
    ]
    rows += [{"instruction": "What?", "output": 7}, {"instruction": "What?", "output": 8}]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def configure(data: Path, models: Path) -> Callable[..., Settings]:
    values = {
        "data_path": str(data),
        "model_name_or_path": str(models / "llava"),
        "eval_fraction": 0.2,
        "test_fraction": 0.1,
    }
    return lambda **more: Settings.from_flags({**values, **more})


@pytest.fixture(scope="module")
def store(configure: Callable[..., Settings], cache: str, ray_here: None) -> Store:
    return find_or_make_store(DataSource.from_settings(configure()), cache)


@pytest.fixture(scope="module")
def summary(store: Store, configure: Callable[..., Settings], models: Path) -> Summary:
    settings = configure(
        max_length=100, on_bad_row="skip", search_space={"max_length": {"choice": [32, 100, 400]}}
    )
    return summarise(store, settings, ModelRef(str(models / "llava")).processor().tokenizer)


def place(store: Store, data: Path, line: int) -> int:
    """The row number of a line of the file."""
    return int(np.flatnonzero(store.column("source") == f"{data}:{line}")[0])


def test_rows_turns_images_and_formats(summary: Summary) -> None:
    assert (summary.rows, summary.turns) == (GOOD, 2 * GOOD)
    assert (summary.images, summary.different_images) == (20 + 2 + MANY, 20)
    assert summary.formats == {"jsonl": GOOD}
    assert summary.image_formats == {"JPEG": 12 + 2 + MANY, "PNG": 8}


def test_bad_rows_are_counted_by_reason_with_the_first_five(summary: Summary, data: Path) -> None:
    assert summary.bad_rows == BAD
    assert [(kind.kind, kind.count) for kind in summary.bad] == [
        ("image: there is no such file", 6),
        ("'output' must be a non-empty string, not a number", 2),
        ("not JSON at column N: Expecting property name enclosed in double quotes", 1),
    ]
    assert summary.bad[0].first == [
        (f"{data}:{GOOD + 1 + number}", f"image {data.parent}/gone/{number}.jpg: there is no such file")
        for number in range(5)
    ]


def test_repeats_and_contradictions_are_told_apart(summary: Summary, data: Path) -> None:
    assert summary.duplicates == Alike(1, 2, [[f"{data}:4", f"{data}:21"]])
    assert summary.contradictions == Alike(1, 2, [[f"{data}:5", f"{data}:22"]])


def test_image_sizes(summary: Summary) -> None:
    assert summary.sizes is not None
    assert (summary.sizes.smallest, summary.sizes.median, summary.sizes.largest) == (
        "64x48",
        "64x48",
        "100x50",
    )
    assert summary.sizes.common == [("64x48", 15 + 2 + MANY), ("100x50", 5)]


def test_tokens_are_text_and_images(summary: Summary, store: Store, data: Path) -> None:
    lengths = sorted(len(example.input_ids) for example in store.read(range(GOOD)))
    row, image = summary.tokens["row"], summary.tokens["image"]
    assert (row.min, row.median, row.p95, row.max) == (lengths[0], lengths[11], lengths[22], lengths[23])
    assert (image.min, image.median, image.max) == (0, IMAGE_TOKENS, MANY * IMAGE_TOKENS)
    long = place(store, data, 23)
    assert summary.tokens["text"].max == row.max == store.column("tokens")[long] == summary.cuts_none
    assert sum(count for _, _, count in summary.histogram) == GOOD
    assert all(
        count == sum(low <= length <= high for length in lengths) for low, high, count in summary.histogram
    )


def test_what_each_length_does(summary: Summary, store: Store, data: Path) -> None:
    examples = store.read(range(GOOD))
    many = place(store, data, 24)
    assert summary.fits_all == store.column("required")[many] > MANY * IMAGE_TOKENS
    assert [(length.max_length, length.origin) for length in summary.lengths] == [
        (32, "search"),
        (100, "config"),
        (256, "usual"),
        (400, "search"),
        (512, "usual"),
        (1024, "usual"),
        (2048, "usual"),
    ]
    trained = set(store.rows_of(TRAIN).tolist())
    for length in summary.lengths:
        longer = {row for row, example in enumerate(examples) if len(example.input_ids) > length.max_length}
        unfit = {row for row in longer if store.column("required")[row] > length.max_length}
        assert (length.shortened, length.unfit, length.unfit_train) == (
            len(longer - unfit),
            len(unfit),
            len(unfit & trained),
        )
    assert [length.unfit for length in summary.lengths] == [1, 1, 0, 0, 0, 0, 0]
    assert [length.shortened for length in summary.lengths][2:4] == [1, 1]


def test_split_and_tokens_of_an_epoch(summary: Summary, store: Store) -> None:
    train = store.rows_of(TRAIN)
    assert summary.split == {name: len(store.rows_of(name)) for name in (TRAIN, EVAL, TEST)}
    assert sum(summary.split.values()) == GOOD
    assert min(summary.split.values()) > 0
    examples = store.read(train.tolist())
    assert summary.epoch_tokens == sum(min(len(example.input_ids), 100) for example in examples)
    cut = [example if required_length(example) > 100 else shorten(example, 100) for example in examples]
    assert summary.epoch_answer_tokens == sum((example.labels >= 0).sum() for example in cut)


@pytest.mark.parametrize("limit", [25, 32, 40, 100, None])
def test_trained_tokens_are_those_that_shortening_leaves(store: Store, limit: int | None) -> None:
    rows = store.rows_of(TRAIN)
    rows = rows[store.column("required")[rows] <= (limit or np.inf)]
    expected = sum(int((shorten(example, limit).labels >= 0).sum()) for example in store.read(rows.tolist()))
    assert trained_tokens(store, rows, limit) == expected
    assert len(rows) > 10


def test_the_example_highlights_the_answer_alone(summary: Summary) -> None:
    assert summary.example is not None
    kinds = [kind for kind, _, _ in summary.example.segments]
    assert kinds == ["template", "image", "template", "text", "template", "answer"]
    texts = {kind: (text, tokens) for kind, text, tokens in summary.example.segments}
    assert texts["image"][1] == IMAGE_TOKENS
    assert texts["text"][0] == "How many people?"
    assert re.fullmatch(r" ?\d+</s>", texts["answer"][0])
    assert f"[[{texts['answer'][0]}]]" in console_report(summary, colour=False)


def test_the_screen_is_one_screen(summary: Summary) -> None:
    text = console_report(summary, colour=False)
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= WIDTH
    for line in (
        f"Bad rows  {BAD} of {GOOD + BAD}",
        "        6 image: there is no such file",
        "            data.jsonl:25, data.jsonl:26, data.jsonl:27, data.jsonl:28, data.jsonl:29, … 1 more",
        "          data.jsonl:4 = data.jsonl:21",
        "          data.jsonl:5 ≠ data.jsonl:22",
        f"Split     train {summary.split[TRAIN]}, eval {summary.split[EVAL]}, test {summary.split[TEST]} rows",
    ):
        assert line in text.splitlines()
    coloured = console_report(summary, colour=True)
    assert "\x1b[" in coloured
    assert "[[" not in coloured
    assert "\x1b" not in text


def test_the_page_needs_nothing_but_itself(
    summary: Summary, store: Store, configure: Callable[..., Settings]
) -> None:
    shown = pick_samples(store, DataSource.from_settings(configure()).scan().pieces)
    assert len(shown) == 12
    text = html_report(summary, shown)
    links = Links(text)
    assert links.targets
    assert all(target.startswith("data:image/jpeg;base64,") for target in links.targets)
    assert links.tags.count("img") == sum(len(sample.images) for sample in shown) >= 12
    assert "svg" in links.tags
    assert not {"script", "link", "iframe", "object"} & set(links.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    for words in ("there is no such file", "data.jsonl:25", "this config", "How many people?", "<mark>"):
        assert words in text


def test_texts_of_the_data_cannot_become_part_of_the_page(
    tmp_path: Path, models: Path, cache: str, ray_here: None
) -> None:
    rows = [
        {"instruction": f"<script>alert({number})</script>\x1b[31m", "output": "<img src=x>"}
        for number in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings.from_flags(
        {"data_path": str(tmp_path / "d.jsonl"), "model_name_or_path": str(models / "llava")}
    )
    source = DataSource.from_settings(settings)
    made = prepare_store(source, cache)
    found = summarise(made, settings, source.model.processor().tokenizer)
    text = html_report(found, pick_samples(made, source.scan().pieces))
    assert not {"script", "img"} & set(Links(text).tags)
    assert "&lt;script&gt;alert(" in text
    assert "\x1b" not in console_report(found, colour=False)


def test_bad_rows_are_refused_at_use_and_the_store_is_shared(
    store: Store, configure: Callable[..., Settings], cache: str
) -> None:
    with pytest.raises(
        DataError,
        match=rf"gone/0\.jpg: there is no such file.*and 4 more \({BAD} of {GOOD + BAD} rows are bad; --on_bad_row",
    ):
        prepare_store(DataSource.from_settings(configure()), cache)
    assert prepare_store(DataSource.from_settings(configure(on_bad_row="skip")), cache).folder == store.folder
    assert [row["source"].rpartition(":")[2] for row in store.bad_rows()] == [
        str(GOOD + 1 + number) for number in range(BAD)
    ]


def test_a_missing_image_that_arrives_is_noticed(
    tmp_path: Path, models: Path, cache: str, ray_here: None
) -> None:
    rows = [{"image": f"{number}.png", "instruction": "What?", "output": "a"} for number in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(6):
        if number != 2:
            Image.new("RGB", (20, 20), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
    source = DataSource(str(tmp_path / "d.jsonl"), ModelRef(str(models / "llava")))
    with pytest.raises(DataError, match="1 of 6 rows are bad"):
        prepare_store(source, cache)
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "2.png")
    whole = prepare_store(source, cache)
    assert whole.meta.rows == 6
    values = {
        "data_path": source.data_path,
        "model_name_or_path": source.model.name,
        "on_long_row": "skip",
        "max_length": IMAGE_TOKENS,
    }
    (problem,) = check(whole, Settings.from_flags(values))  # nothing is left to train on
    assert problem.startswith("4 of 4 training rows do not fit max_length 16")
    assert "on_long_row" not in problem


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"instruction": "What?", "output": None}], "no usable row"),
        ([{"instruction": "What?", "output": "a"}] * 3, "leave no row for train"),
    ],
)
def test_data_that_leave_nothing_to_train_on_are_told_of(
    tmp_path: Path, models: Path, cache: str, ray_here: None, rows: list[dict[str, Any]], problem: str
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data_path": str(tmp_path / "d.jsonl"),
        "model_name_or_path": str(models / "llava"),
        "on_bad_row": "skip",
    }
    settings = Settings.from_flags(values)
    found = summarise(
        find_or_make_store(DataSource.from_settings(settings), cache),
        settings,
        ModelRef(str(models / "llava")).processor().tokenizer,
    )
    assert not found.ready
    assert problem in found.problems[0]
    assert problem in re.sub(r"\s+", " ", console_report(found, colour=False))
    assert "cannot work" in html_report(found, [])
    with pytest.raises(DataError, match=problem):
        prepare_store(DataSource.from_settings(settings), cache)


def test_training_rows_that_do_not_fit_are_a_problem_unless_skipped(
    store: Store, configure: Callable[..., Settings]
) -> None:
    train, required = store.rows_of(TRAIN), store.column("required")
    enough = int(required[train].max())
    assert check(store, configure(on_bad_row="skip", max_length=enough)) == []
    assert len(rows_too_long(store, enough)) == len(rows_too_long(store, None)) == 0
    short = enough - 1
    assert rows_too_long(store, short).tolist() == [row for row in train if required[row] > short] != []
    (problem,) = check(store, configure(on_bad_row="skip", max_length=short))
    assert f"max_length {short} " in problem
    assert f"{enough} keeps a word of each answer" in problem
    assert check(store, configure(on_bad_row="skip", on_long_row="skip", max_length=short)) == []
    assert f"{BAD} of {GOOD + BAD} rows are bad" in check(store, configure(max_length=enough))[0]


@pytest.fixture(scope="module")
def floor(store: Store) -> int:
    return int(store.column("required")[store.rows_of(TRAIN)].max())


@pytest.mark.parametrize("name", ["max_length", "max_seq_length"])
@pytest.mark.parametrize(
    ("entry", "kept", "removed"),
    [
        (
            lambda need: {"choice": [need - 1, need, 512, None]},
            lambda need: {"choice": [need, 512, None]},
            "{before}",
        ),
        (lambda need: {"grid": [8, need - 1, 512]}, lambda need: {"grid": [512]}, "8 and {before}"),
        (lambda need: {"randint": [8, 512]}, lambda need: {"randint": [need, 512]}, "from 8 to {before}"),
        (lambda need: {"lograndint": [8, need + 1]}, lambda need: need, "from 8 to {before}"),
        (
            lambda need: {"quniform": [8, 1600, 8]},
            lambda need: {"quniform": [-(-need // 8) * 8, 1600, 8]},
            "from 8 to ",
        ),
        (
            lambda need: {"qloguniform": [need - 1, 2 * (need - 1), need - 1]},
            lambda need: 2 * (need - 1),
            "from {before} to ",
        ),
        (lambda need: {"choice": [need, 512]}, lambda need: {"choice": [need, 512]}, None),
        (lambda need: need, lambda need: need, None),
        (lambda need: {"expr": "8 * lora_r"}, lambda need: {"expr": "8 * lora_r"}, None),
    ],
)
def test_lengths_that_images_do_not_fit_are_not_searched(
    store: Store,
    floor: int,
    name: str,
    entry: Callable[[int], Any],
    kept: Callable[[int], Any],
    removed: str | None,
) -> None:
    space, reasons = usable_max_lengths(store, {"lora_r": {"choice": [4, 8]}, name: entry(floor)})
    assert space == {"lora_r": {"choice": [4, 8]}, name: kept(floor)}
    if removed is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert reasons[0].startswith(f"{name} {removed.format(before=floor - 1)}")
        assert f"alone need {floor} tokens" in reasons[0]


@pytest.mark.parametrize("entry", [{"choice": [8, 16]}, {"randint": [8, 17]}, {"quniform": [8, 16, 8]}, 16])
def test_a_search_without_a_usable_length_stops(store: Store, floor: int, entry: Any) -> None:
    with pytest.raises(
        DataError, match=f"search_space: max_length: no value can be used.*search from {floor} on"
    ):
        usable_max_lengths(store, {"max_length": entry})


def test_a_search_that_would_skip_all_rows_stops(store: Store) -> None:
    with pytest.raises(DataError, match="search_space: max_length: no training row fits 2 tokens"):
        usable_max_lengths(store, {"max_length": {"choice": [1, 2]}}, on_long_row="skip")


def test_skipped_rows_ask_for_no_length(store: Store, floor: int) -> None:
    required = store.column("required")[store.rows_of(TRAIN)]
    largest = floor - 1
    needed = int(required[required <= largest].max())
    space, reasons = usable_max_lengths(
        store, {"max_length": {"choice": [needed - 1, needed, largest]}}, on_long_row="skip"
    )
    assert space == {"max_length": {"choice": [needed, largest]}}
    assert f"alone need {needed} tokens" in reasons[0]


def test_searched_lengths_are_listed() -> None:
    assert searched_max_lengths({"max_length": {"randint": [100, 201]}}) == [100, 200]
    assert searched_max_lengths({"max_seq_length": {"choice": [64, None]}}) == [64, None]
    assert searched_max_lengths({"lora_r": {"choice": [1, 2]}}) == []


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("image path /data/a b.jpg leaves the folder /data: move", "image path … leaves the folder … move"),
        ("image https://host/1.jpg is remote: download it", "image … is remote: download it"),
        ("messages[12].role is 'bot': it must be", "messages[N].role is 'bot': it must be"),
        (
            "frame cam1_2.jpg has a row already, on line 3: keep one",
            "frame … has a row already, on line N: keep one",
        ),
        ("byte 17 of the line is not UTF-8", "byte N of the line is not UTF-8"),
        ("2 <image> marks but 1 image: give each", "N <image> marks but N image: give each"),
    ],
)
def test_reasons_of_one_kind_are_alike(reason: str, kind: str) -> None:
    assert error_kind(reason) == kind
