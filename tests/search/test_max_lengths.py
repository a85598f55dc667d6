"""Which values of `max_length` a search may use for the prepared rows."""

from collections.abc import Callable
from typing import Any

import pytest

from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.search.max_lengths import searched_max_lengths, usable_max_lengths

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def floor(faulty_store: Store) -> int:
    return int(faulty_store.column("required")[faulty_store.rows_of(TRAIN)].max())


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
    faulty_store: Store,
    floor: int,
    name: str,
    entry: Callable[[int], Any],
    kept: Callable[[int], Any],
    removed: str | None,
) -> None:
    space, reasons = usable_max_lengths(faulty_store, {"lora_r": {"choice": [4, 8]}, name: entry(floor)})
    assert space == {"lora_r": {"choice": [4, 8]}, name: kept(floor)}
    if removed is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert reasons[0].startswith(f"{name} {removed.format(before=floor - 1)}")
        assert f"alone need {floor} tokens" in reasons[0]


@pytest.mark.parametrize("entry", [{"choice": [8, 16]}, {"randint": [8, 17]}, {"quniform": [8, 16, 8]}, 16])
def test_a_search_without_a_usable_length_stops(faulty_store: Store, floor: int, entry: Any) -> None:
    with pytest.raises(
        DataError, match=f"search_space: max_length: no value can be used.*search from {floor} on"
    ):
        usable_max_lengths(faulty_store, {"max_length": entry})


def test_a_search_that_would_skip_all_rows_stops(faulty_store: Store) -> None:
    with pytest.raises(DataError, match="search_space: max_length: no training row fits 2 tokens"):
        usable_max_lengths(faulty_store, {"max_length": {"choice": [1, 2]}}, on_long_row="skip")


def test_skipped_rows_ask_for_no_length(faulty_store: Store, floor: int) -> None:
    required = faulty_store.column("required")[faulty_store.rows_of(TRAIN)]
    largest = floor - 1
    needed = int(required[required <= largest].max())
    space, reasons = usable_max_lengths(
        faulty_store, {"max_length": {"choice": [needed - 1, needed, largest]}}, on_long_row="skip"
    )
    assert space == {"max_length": {"choice": [needed, largest]}}
    assert f"alone need {needed} tokens" in reasons[0]


def test_searched_lengths_are_listed() -> None:
    assert searched_max_lengths({"max_length": {"randint": [100, 201]}}) == [100, 200]
    assert searched_max_lengths({"max_seq_length": {"choice": [64, None]}}) == [64, None]
    assert searched_max_lengths({"lora_r": {"choice": [1, 2]}}) == []
