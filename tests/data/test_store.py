"""Rows come back from the store as they were put in, in any order; damage is reported, never trained on."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data import store_writer
from vlmtune.data.encoded_example import ANSWER, IMAGE, TEMPLATE, TEXT, EncodedExample
from vlmtune.data.input_format import InputFormat, Normalization, TensorLayout
from vlmtune.data.store import IMAGES, INDEX, Store
from vlmtune.data.store_meta import StoreMeta
from vlmtune.data.store_writer import write_shard
from vlmtune.errors import DataError

ROWS, PER_SHARD = 23, 9
INPUTS = InputFormat(
    nested_images=True,
    layouts={"pixel_values": TensorLayout("items"), "cross_attention_mask": TensorLayout("tokens", 1)},
    normalizations={"pixel_values": Normalization(1 / 255, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))},
)
META = StoreMeta(
    "key",
    INPUTS,
    pad_token_id=7,
    rows=ROWS,
    bad_rows=0,
    problem=None,
    encoded=True,
)


def example(row: int) -> EncodedExample:
    """Rows of all lengths; every third is text alone, the others have uint8 pixels and an integer mask."""
    draw = np.random.RandomState(row)
    kinds = np.repeat([TEMPLATE, IMAGE, TEXT, TEMPLATE, ANSWER, TEXT, ANSWER], draw.randint(1, 9, 7)).astype(
        np.uint8
    )
    tensors: dict[str, np.ndarray] = {}
    if row % 3:
        pixels = draw.randint(0, 256, (row % 4 + 1, 3, 14, 14)).astype(np.uint8)
        tensors = {"pixel_values": pixels, "cross_attention_mask": draw.randint(0, 2, (1, len(kinds), 4))}
    ids = draw.randint(0, 2**31 - 1, len(kinds)).astype(np.int32)
    return EncodedExample(ids, kinds, tensors, INPUTS.token_axes(tensors, len(ids)))


def write_store(folder: Path) -> Path:
    """A store of three shards with several row groups each."""
    folder.mkdir()
    index = []
    for start in range(0, ROWS, PER_SHARD):
        rows = range(start, min(start + PER_SHARD, ROWS))
        shard = f"rows-{start:05d}.parquet"
        for row, (group, offset) in zip(
            rows, write_shard(str(folder / shard), [example(row) for row in rows]), strict=True
        ):
            line = {
                "source": f"data.jsonl:{row + 1}",
                "split": "eval" if row % 5 == 0 else "train",
                "number": row,
            }
            index.append({**line, "shard": shard, "row_group": group, "offset": offset})
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX), folder / "index.parquet")
    pq.write_table(pa.Table.from_pylist([], schema=IMAGES), folder / "images.parquet")
    (folder / "meta.json").write_text(json.dumps(META.to_dict()))
    return folder


@pytest.fixture(autouse=True, scope="module")
def small_row_groups() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "ROW_GROUP_BYTES", 5000)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(write_store(tmp_path_factory.mktemp("store") / "key.1")))


def assert_same(found: EncodedExample, expected: EncodedExample) -> None:
    assert found.input_ids.dtype == np.int32
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.kinds, expected.kinds)
    assert np.array_equal(found.labels, expected.labels)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert np.array_equal(found.tensors[name], value)


def test_rows_that_were_read_are_not_kept(tmp_path: Path) -> None:
    store = Store(str(write_store(tmp_path / "key.1")))
    before = pa.total_allocated_bytes()
    size = sum(value.nbytes for row in store.read(range(ROWS)) for value in row.tensors.values())
    assert pa.total_allocated_bytes() - before < size / 10


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=12))
def test_any_rows_in_any_order(store: Store, rows: list[int]) -> None:
    found = store.read(rows)
    assert len(found) == len(rows)
    for row, each in zip(rows, found, strict=True):
        assert_same(each, example(row))


def test_rows_lie_in_several_shards_and_row_groups(store: Store) -> None:
    places = set(zip(store.column("shard"), store.column("row_group"), strict=True))
    assert len(set(store.column("shard"))) == 3
    assert len(places) > 6


def test_a_row_group_is_read_once_for_a_call(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    read = Store._row_group
    monkeypatch.setattr(Store, "_row_group", lambda self, *place: reads.append(place) or read(self, *place))
    store.read(list(range(ROWS)) * 2)
    assert len(reads) == len(set(reads))


def test_splits_are_row_numbers_in_order(store: Store) -> None:
    assert store.rows_of("eval").tolist() == [0, 5, 10, 15, 20]
    assert store.rows_of("train").tolist() == [row for row in range(ROWS) if row % 5]
    assert store.rows_of("test").tolist() == []
    assert store.column("source")[3] == "data.jsonl:4"


def test_it_pickles_as_its_path(store: Store) -> None:
    packed = pickle.dumps(store)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert again.meta == store.meta == META
    assert_same(again.read([4])[0], example(4))


def test_a_folder_without_meta_is_no_store(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "key.1")
    assert Store.exists(str(folder))
    (folder / "meta.json").unlink()
    assert not Store.exists(str(folder))
    assert not Store.exists(str(tmp_path / "nowhere"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One byte of the rows, not of the file's own structure, as a bad disk leaves it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_a_damaged_shard_is_a_data_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = write_store(tmp_path / "key.1")
    damaged = folder / "rows-00009.parquet"
    damage(damaged)
    opened = Store(str(folder))
    assert_same(opened.read([2])[0], example(2))
    with pytest.raises(DataError, match=r"cannot be read .*: delete .* to prepare again") as refusal:
        opened.read(range(ROWS))
    assert str(damaged) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["meta.json", "index.parquet"])
@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_a_store_that_cannot_be_opened_is_a_data_error(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = write_store(tmp_path / "key.1")
    damage(folder / name)
    with pytest.raises(
        DataError, match=f"{folder / name} cannot be read .*: delete {folder} to prepare again"
    ):
        Store(str(folder))


ROW = {
    "source": "data.jsonl:3",
    "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "몇 명?\n\0"}]}],
    "images": ["/data/a.jpg", b"\xff\xd8\0", "s3://bucket/b.jpg", b""],
    "group": "camera 1",
    "error": None,
}


def test_rows_as_they_were_read_come_back(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "key.1")
    text = {**ROW, "images": []}
    write_shard(str(folder / "rows-00000.parquet"), [ROW, text] * PER_SHARD)
    assert Store(str(folder)).records([1, 0]) == [text, ROW]


class Proof:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_planted_store_runs_no_code(tmp_path: Path) -> None:
    """The store with which a pickle in place of a row would run."""
    folder = write_store(tmp_path / "key.1")
    planted = pickle.dumps(Proof(tmp_path / "ran"))
    pq.write_table(pa.table({"record": [planted] * PER_SHARD}), folder / "rows-00000.parquet")
    with pytest.raises(DataError, match="to prepare again"):
        Store(str(folder)).records([0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"processor": {"model": "m", "revision": "main", "trust_remote_code": True}},
        {"encoded": "false"},
        {"rows": True},
        {"rows": ROWS + 1},
        {"inputs": {"nested_images": True, "layouts": {"x": {"kind": "tokens", "shell": "id"}}}},
    ],
)
def test_a_meta_file_of_another_form_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_store(tmp_path / "key.1")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(DataError, match="to prepare again"):
        Store(str(folder))


def test_an_index_that_names_files_outside_the_store_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "key.1")
    index = pq.read_table(folder / "index.parquet")
    shards = pa.array(["../../secret.parquet"] * ROWS)
    changed = index.set_column(index.schema.get_field_index("shard"), "shard", shards)
    pq.write_table(changed, folder / "index.parquet")
    with pytest.raises(DataError, match="no file of a store"):
        Store(str(folder))
