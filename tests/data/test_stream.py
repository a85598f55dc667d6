"""The stream of batches: what Ray Data reads ahead is, batch by batch, what this process reads."""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch

from vlmtune.cluster import connect
from vlmtune.data.cache import prepare_store
from vlmtune.data.encoded_example import IGNORED
from vlmtune.data.order import BatchRows, Order, evaluation_order
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.stream import LOOP_SECONDS, Batch, ThrottledExecutor, read_batches, stream_batches
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module", params=["llava", "mllama"])
def store(
    request: pytest.FixtureRequest,
    cluster: None,
    models: Path,
    mall: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    return prepare_store(
        DataSource(str(mall), ModelRef(str(models / request.param))), str(tmp_path_factory.mktemp("cache"))
    )


def assert_same(streamed: list[Batch], read: list[Batch]) -> None:
    assert len(streamed) == len(read)
    for one, other in zip(streamed, read, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == value.dtype, name
            assert torch.equal(one[name], value), name


@pytest.mark.parametrize(("world_size", "max_length"), [(1, None), (3, None), (3, 40)])
def test_stream_equals_reading_here(store: Store, world_size: int, max_length: int | None) -> None:
    """Over a shuffled epoch with a short last step, on every rank; 40 tokens cut every row."""
    rows = len(store.rows_of("train"))
    order = Order(rows=rows, per_device=3, accumulation=2, world_size=world_size, seed=5)
    for rank in range(world_size):
        batches = order.epoch(1, rank)
        read = list(read_batches(store, "train", batches, max_length))
        assert_same(list(stream_batches(store, "train", batches, max_length)), read)
        assert max(batch["input_ids"].shape[1] for batch in read) <= (max_length or 10_000)


def test_batches_have_the_rows_that_the_order_names(store: Store) -> None:
    """Many tasks of very different size: rows are known by their ids."""
    rows = store.rows_of("train")
    ids = [example.input_ids for example in store.read(rows)]
    choose = random.Random(1)
    batches = [
        BatchRows(tuple(choose.choices(range(len(rows)), k=1 if index % 7 else 16))) for index in range(60)
    ]
    for batch, tensors in zip(batches, stream_batches(store, "train", batches, None), strict=True):
        for row, found, mask in zip(batch.rows, tensors["input_ids"], tensors["attention_mask"], strict=True):
            assert found[mask.bool()].tolist() == ids[row].tolist()


def test_fillers_carry_no_labels(store: Store) -> None:
    batches = [BatchRows((1, 0)), BatchRows((2,), filler=True), BatchRows((2,))]
    read = list(read_batches(store, "train", batches, None))
    assert_same(list(stream_batches(store, "train", batches, None)), read)
    labelled = [bool((batch["labels"] != IGNORED).any()) for batch in read]
    assert labelled == [True, False, True]
    assert torch.equal(read[1]["input_ids"], read[2]["input_ids"])


def test_evaluation_rows_of_every_rank(store: Store) -> None:
    rows = len(store.rows_of("eval"))
    batches = [batch for rank in range(4) for batch in evaluation_order(rows, 1, rank, 4)]
    assert any(batch.filler for batch in batches)
    read = list(read_batches(store, "eval", batches, None))
    assert_same(list(stream_batches(store, "eval", batches, None)), read)
    trained = sum(int((batch["labels"] != IGNORED).sum()) for batch in read)
    assert trained == sum(
        int((example.labels != IGNORED).sum()) for example in store.read(store.rows_of("eval"))
    )


def test_resumed_in_the_middle_the_stream_goes_on(store: Store) -> None:
    order = Order(rows=len(store.rows_of("train")), per_device=2, accumulation=1, world_size=1, seed=3)
    whole = list(stream_batches(store, "train", order.epoch(0, 0), None))
    assert_same(list(stream_batches(store, "train", order.epoch(0, 0, first_step=7), None)), whole[7:])


def test_no_batch_is_an_empty_stream(store: Store) -> None:
    assert (
        list(stream_batches(store, "train", [], None)) == list(read_batches(store, "train", [], None)) == []
    )


def test_lengths_are_padded_to_a_multiple(store: Store) -> None:
    batches = [BatchRows((0, 1, 2)), BatchRows((3,))]
    read = list(read_batches(store, "train", batches, None, pad_to_multiple_of=32))
    assert_same(list(stream_batches(store, "train", batches, None, pad_to_multiple_of=32)), read)
    assert all(batch["input_ids"].shape[1] % 32 == 0 for batch in read)


def test_damage_is_told_as_it_is_in_a_task(store: Store, models: Path, mall: Path, tmp_path: Path) -> None:
    own = prepare_store(DataSource(str(mall), ModelRef(str(models / "llava")), seed=1), str(tmp_path))
    for shard in Path(own.folder).glob("rows-*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DataError) as refusal:
        list(stream_batches(own, "train", [BatchRows((0,))], None))
    assert type(refusal.value) is DataError
    assert "\n" not in str(refusal.value)
    assert f"delete {own.folder} to prepare again" in str(refusal.value)


def test_a_full_stream_leaves_the_trainers_process_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While more is ready than there is room for, Ray Data's executor would ask its readers some 2,000 times
    a second."""
    limits = ray.data.ExecutionResources(object_store_memory=1)
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "resource_limits", limits)
    steps = []
    step = ThrottledExecutor.on_execution_step
    monkeypatch.setattr(
        ThrottledExecutor,
        "on_execution_step",
        lambda self, executor: (steps.append(time.monotonic()), step(self, executor)),
    )
    batches = [BatchRows((row % 8,)) for row in range(120)]
    with closing(stream_batches(store, "train", batches, None)) as stream:
        read = [next(stream)]
        time.sleep(1)  # until the readers have all that there is room for
        before, started = len(steps), time.monotonic()
        time.sleep(1)
        assert 3 <= len(steps) - before <= (time.monotonic() - started) / LOOP_SECONDS + 1
        assert_same([*read, *stream], list(read_batches(store, "train", batches, None)))
