"""Rows that were read from the store stay in memory, up to a limit."""

from typing import Any

import numpy as np
import pytest

from vlmtune.data.store import Store
from vlmtune.packed import example_cache
from vlmtune.packed.example_cache import ExampleCache


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that were read from the store, in order."""
    rows_read: list[int] = []
    read_examples = example_cache.read_examples

    def recorded(store: Store, rows: Any) -> Any:
        rows_read.extend(rows)
        return read_examples(store, rows)

    monkeypatch.setattr(example_cache, "read_examples", recorded)
    return rows_read


def test_a_row_is_read_once(stores: dict[str, Store], read: list[int]) -> None:
    store = stores["mall llava"]
    cache = ExampleCache(store)
    examples = cache.get([3, 1, 3])
    assert sorted(examples) == [1, 3]
    (expected,) = store.read([3])
    assert np.array_equal(examples[3].input_ids, expected.input_ids)
    cache.prefetch([1, 5])
    assert cache.get([5, 3])[5] is cache.get([5])[5]
    assert sorted(read) == [1, 3, 5]


def test_the_rows_used_last_stay_and_those_asked_for_always_do(
    stores: dict[str, Store], read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExampleCache(stores["mall llava"])
    cache.get([0, 1, 2])
    one = cache.bytes / 3
    monkeypatch.setattr(example_cache, "CACHE_BYTES", 2.5 * one)
    cache.get([0])
    assert sorted(cache.examples) == [0, 2], "row 1 was used longest ago"
    assert sorted(cache.get([3, 4, 5, 6])) == [3, 4, 5, 6]
    assert sorted(cache.examples) == [3, 4, 5, 6]
    cache.get([6])
    assert sorted(cache.examples) == [5, 6]
    assert cache.bytes <= 2.5 * one


def test_a_row_that_cannot_be_read_ahead_raises_when_it_is_needed(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExampleCache(stores["mall llava"])

    def fail(store: Store, rows: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(example_cache, "read_examples", fail)
    cache.prefetch([1])
    with pytest.raises(OSError, match="the disk is gone"):
        cache.get([1])
