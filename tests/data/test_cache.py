"""The cache folder: size limit, what is never deleted, and rows that are kept unencoded."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from faulty_rows import BAD, GOOD
from PIL import Image

from vlmtune.cluster import connect
from vlmtune.data.cache import PART, SAFE_SECONDS, USED, find_or_make_store, keep_within, prepare_store
from vlmtune.data.examples import read_examples
from vlmtune.data.order import Order
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches, stream_batches
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef


def fake_store(cache: Path, number: int, *, age: float, megabytes: int = 1) -> Path:
    folder = cache / f"{'0' * 23}{number}.abcdef0{number}"
    folder.mkdir(parents=True)
    (folder / "rows-0.parquet").write_bytes(bytes(megabytes << 20))
    (folder / USED).touch()
    for path in folder.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    old, older, oldest = (fake_store(tmp_path, number, age=SAFE_SECONDS * number) for number in (2, 3, 4))
    keep_within(str(tmp_path), 2.5 / 1024)
    assert [old.exists(), older.exists(), oldest.exists()] == [True, True, False]
    (older / USED).touch()  # used just now
    keep_within(str(tmp_path), 0)
    assert [old.exists(), older.exists()] == [False, True]


def test_what_killed_runs_left_is_deleted_too_and_nothing_else(tmp_path: Path) -> None:
    left = fake_store(tmp_path, 1, age=2 * SAFE_SECONDS)
    left = left.rename(left.with_name(left.name + PART))
    being_made = fake_store(tmp_path, 2, age=1)
    foreign = tmp_path / "photos.2024"
    foreign.mkdir()
    (foreign / "a.jpg").write_bytes(bytes(1 << 20))
    os.utime(foreign / "a.jpg", (0, 0))
    keep_within(str(tmp_path), 0)
    assert [left.exists(), being_made.exists(), foreign.exists()] == [False, True, True]


@pytest.fixture(scope="module")
def source(mall: Path, models: Path) -> Iterator[DataSource]:
    connect()
    yield DataSource(data_path=str(mall), model=ModelRef(str(models / "llava")))
    ray.shutdown()


def test_no_cache_gives_the_same_batches_without_pixels_on_disk(source: DataSource, tmp_path: Path) -> None:
    cached = prepare_store(source, str(tmp_path / "a"))
    raw = prepare_store(DataSource(**{**vars(source), "encoded": False}), str(tmp_path / "b"))
    size = {
        store.folder: sum(path.stat().st_size for path in Path(store.folder).glob("rows-*"))
        for store in (cached, raw)
    }
    assert size[raw.folder] < size[cached.folder] / 5
    assert raw.index.drop_columns(["row_group", "offset"]).equals(
        cached.index.drop_columns(["row_group", "offset"])
    )
    order = Order(rows=len(cached.rows_of("train")), per_device=4, accumulation=1, world_size=1, seed=3)
    batches = order.epoch(0, 0)[:5]
    for kept, read, streamed in zip(
        read_batches(cached, "train", batches, 64),
        read_batches(raw, "train", batches, 64),
        stream_batches(raw, "train", batches, 64),
        strict=True,
    ):
        assert kept.keys() == read.keys() == streamed.keys()
        for name in kept:
            assert np.array_equal(kept[name], read[name])
            assert np.array_equal(kept[name], streamed[name])


def test_no_cache_notices_an_image_that_went_away(source: DataSource, mall: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mall, tmp_path / "mall")
    store = prepare_store(
        DataSource(**{**vars(source), "data_path": str(copy), "encoded": False}), str(tmp_path / "cache")
    )
    shutil.rmtree(copy / "frames")
    with pytest.raises(DataError, match=r"image .*: .* \(it could be read when the run began\)"):
        read_examples(store, [0])


def test_a_store_in_use_is_marked(source: DataSource, tmp_path: Path) -> None:
    store = find_or_make_store(source, str(tmp_path))
    used = Path(store.folder) / USED
    os.utime(used, (0, 0))
    find_or_make_store(source, str(tmp_path), size_gb=0)
    assert time.time() - used.stat().st_mtime < 60
    assert Path(store.folder, "meta.json").exists()


def test_bad_rows_are_refused_at_use_and_the_store_is_shared(
    faulty_store: Store, faulty_data: Path, models: Path, source: DataSource
) -> None:
    cache = str(Path(faulty_store.folder).parent)
    faulty = replace(source, data_path=str(faulty_data), eval_fraction=0.2, test_fraction=0.1)
    reasons = r"gone/0\.jpg: there is no such file.*and 4 more"
    with pytest.raises(DataError, match=rf"{reasons} \({BAD} of {GOOD + BAD} rows are bad; --on_bad_row"):
        prepare_store(faulty, cache)
    assert (
        prepare_store(replace(faulty, on_bad_row="skip", max_bad_fraction=0.9), cache).folder
        == faulty_store.folder
    )
    assert [row["source"].rpartition(":")[2] for row in faulty_store.bad_rows()] == [
        str(GOOD + 1 + number) for number in range(BAD)
    ]


def test_a_missing_image_that_arrives_is_noticed(tmp_path: Path, source: DataSource) -> None:
    rows = [{"image": f"{number}.png", "instruction": "What?", "output": "a"} for number in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(6):
        if number != 2:
            Image.new("RGB", (20, 20), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
    source = replace(source, data_path=str(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match="1 of 6 rows are bad"):
        prepare_store(source, str(tmp_path / "cache"))
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "2.png")
    assert prepare_store(source, str(tmp_path / "cache")).meta.rows == 6


def test_a_planted_store_is_refused(source: DataSource, tmp_path: Path) -> None:
    """One under the right name, whose rows would be read in another way than was asked for."""
    store = find_or_make_store(source, str(tmp_path))
    meta = Path(store.folder, "meta.json")
    for change in ({"encoded": False}, {"key": "0" * 24}):
        kept = meta.read_text()
        meta.write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(DataError, match="do not belong to this data and these options: delete"):
            find_or_make_store(source, str(tmp_path))
        meta.write_text(kept)
