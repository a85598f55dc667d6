"""Samples of the rows: where they are, and what is shown of them."""

import base64
import io
import json
from pathlib import Path

import pytest
from faulty_rows import GOOD, MANY_IMAGES, row_of
from PIL import Image

from vlmtune.data.samples import IMAGES_PER_SAMPLE, SAMPLES, load_samples, pick_samples, sample_rows
from vlmtune.data.scan import scan
from vlmtune.data.store import Store

pytestmark = pytest.mark.timeout(180)


def test_rows_with_different_images_at_even_distances(faulty_store: Store, faulty_data: Path) -> None:
    samples = pick_samples(faulty_store, scan(str(faulty_data)))
    lines = [int(sample.source.rpartition(":")[2]) for sample in samples]
    assert len(lines) == SAMPLES
    assert lines == sorted(set(lines))
    assert lines[0] == 1 and lines[-1] == GOOD
    assert not {21, 22, 23} & set(lines), "an image twice, or a row without one"


def test_every_dialogue_of_the_images_is_sampled(stores: dict[str, Store], mall: Path) -> None:
    samples = pick_samples(stores["mall llava"], scan(str(mall)))
    questions = [sample.turns[0][1] for sample in samples]
    korean = [any("가" <= letter <= "힣" for letter in text) for text in questions]
    assert len({sample.names for sample in samples}) == len(samples) == SAMPLES, "each image once"
    assert korean == [bool(number % 2) for number in range(SAMPLES)], "English and Korean in turn"
    for own in (korean, [not one for one in korean]):
        assert len({sample.names for sample, is_own in zip(samples, own, strict=True) if is_own}) == 6


def images_of(by_language: dict[str, dict[str, list[int]]], rows: list[int]) -> dict[str, list[str]]:
    """The images of the chosen rows of each language."""
    return {
        language: [image for image, own in images.items() if set(own) & set(rows)]
        for language, images in by_language.items()
    }


def test_each_language_is_sampled_over_different_images() -> None:
    """Where an image has one language, and where it has both, in whatever pattern the data repeats."""
    both = {name: {f"i{n}": [2 * n + odd] for n in range(23)} for odd, name in enumerate(("en", "ko"))}
    alone = {name: {f"{name}{n}": [2 * n + odd] for n in range(11)} for odd, name in enumerate(("en", "ko"))}
    blocks = {name: {f"{name}{n}": [50 * k + n] for n in range(50)} for k, name in enumerate(("en", "ko"))}
    for by_language in (both, alone, blocks):
        rows = sample_rows(by_language)
        images = images_of(by_language, rows)
        assert len(set(rows)) == SAMPLES and {len(own) for own in images.values()} == {SAMPLES // 2}
        assert not set(images["en"]) & set(images["ko"]), "each image once"


def test_a_language_of_few_images_is_not_left_out() -> None:
    few = {
        "en": {f"i{n}": [3 * n, 3 * n + 1] for n in range(100)},
        "ko": {"i40": [122]},
        "ja": {"i41": [125], "i42": [128]},
    }
    rows = sample_rows(few)
    images = images_of(few, rows)
    assert len(rows) == SAMPLES and {name: len(own) for name, own in images.items()} == {
        "en": SAMPLES - 3,
        "ko": 1,
        "ja": 2,
    }
    assert len({image for own in images.values() for image in own}) == SAMPLES
    assert {row % 3 for row in rows if row not in (122, 125, 128)} == {0, 1}, "both dialogues in English"
    assert sample_rows({"en": {"i": [0]}, "ko": {"i": [1]}}) == [0, 1], "one image, two languages"
    assert sample_rows({}) == []


def test_what_is_shown_of_a_row(faulty_store: Store, faulty_data: Path) -> None:
    rows = [row_of(faulty_store, faulty_data, line) for line in (GOOD, 1)]
    many, first = load_samples(faulty_store, scan(str(faulty_data)), rows)
    assert (first.source, first.turns) == (
        f"{faulty_data}:1",
        [("user", "How many people?"), ("assistant", "0")],
    )
    assert first.tokens == faulty_store.column("tokens")[rows[1]]
    assert first.split == faulty_store.column("split")[rows[1]]
    assert len(many.images) == IMAGES_PER_SAMPLE < MANY_IMAGES
    header, _, data = first.images[0].partition(",")
    assert header == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 48)


def test_an_image_that_is_gone_by_now_is_left_out(
    faulty_store: Store, faulty_data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / faulty_data.name
    copy.write_bytes(faulty_data.read_bytes())  # without the images beside it
    (sample,) = load_samples(faulty_store, scan(str(copy)), [row_of(faulty_store, faulty_data, 1)])
    assert sample.images == []
    assert sample.turns[0][1] == "How many people?"


def test_boxes_are_drawn(faulty_store: Store, faulty_data: Path) -> None:
    lines = faulty_data.read_text().splitlines()
    row = json.loads(lines[0])
    box = {"objects": {"bbox": [[16, 12, 48, 36]]}, "output": "<bbox>"}
    copy = faulty_data.with_name("with-boxes.jsonl")
    copy.write_text("\n".join([json.dumps({**row, **box}), *lines[1:]]) + "\n")
    (sample,) = load_samples(faulty_store, scan(str(copy)), [row_of(faulty_store, faulty_data, 1)])
    image = Image.open(io.BytesIO(base64.b64decode(sample.images[0].partition(",")[2])))
    assert sample.turns[1] == ("assistant", "<bbox>")
    edge, inside = image.getpixel((16, 24)), image.getpixel((32, 24))
    assert isinstance(edge, tuple) and isinstance(inside, tuple)
    assert edge[0] - max(edge[1:]) > 100 > inside[0] - max(inside[1:])
