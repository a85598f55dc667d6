"""The order of rows: every row once an epoch, the same rows a step for any number of workers, and never
another one."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.order import GROUPED_STEPS, BatchRows, Mixture, Order, evaluation_order

thorough = settings(max_examples=300, deadline=None, derandomize=True)
orders = st.builds(
    Order,
    rows=st.integers(1, 70),
    per_device=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)


def rows_of(batches: list[BatchRows]) -> list[int]:
    """The rows that are trained on: those of fillers are not."""
    return [row for batch in batches if not batch.filler for row in batch.rows]


def ranks(order: Order, epoch: int = 0, first_step: int = 0) -> list[list[BatchRows]]:
    return [order.epoch(epoch, rank, first_step) for rank in range(order.world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_eleven_rows_are_each_seen_once_an_epoch(world_size: int, accumulation: int) -> None:
    order = Order(rows=11, per_device=2, accumulation=accumulation, world_size=world_size, seed=42)
    for epoch in range(3):
        assert sorted(chain.from_iterable(map(rows_of, ranks(order, epoch)))) == list(range(11))


@pytest.mark.parametrize("per_device", [4, 2, 1])
def test_a_step_has_the_same_rows_for_any_number_of_workers(per_device: int) -> None:
    """At 4 rows a step: 1 worker of 4, 2 of 2, 4 of 1, or fewer workers that accumulate."""
    one = Order(rows=11, per_device=4, accumulation=1, world_size=1, seed=42)
    for world_size in (1, 2, 4):
        if 4 % (world_size * per_device):
            continue
        order = replace(
            one, per_device=per_device, accumulation=4 // (world_size * per_device), world_size=world_size
        )
        assert order.steps_per_epoch == one.steps_per_epoch == 3
        for step in range(3):
            rows = chain.from_iterable(rows_of(order.step(1, step, rank)) for rank in range(world_size))
            assert sorted(rows) == sorted(rows_of(one.step(1, step, 0)))


@thorough
@given(orders, st.integers(0, 3))
def test_rows_grouped_by_length_are_each_seen_once_and_need_less_padding(order: Order, epoch: int) -> None:
    lengths = np.random.RandomState(0).randint(1, 1000, order.rows)
    grouped = replace(order, lengths=tuple(lengths.tolist()))
    assert sorted(grouped.permutation(epoch)) == list(range(order.rows))

    def padded(one: Order) -> int:
        batches = [batch for rank in ranks(one, epoch) for batch in rank if not batch.filler]
        return sum(len(batch.rows) * int(lengths[list(batch.rows)].max()) for batch in batches)

    if order.rows <= order.rows_per_step * GROUPED_STEPS and order.rows_per_step < order.rows:
        assert padded(grouped) <= padded(order)
    assert [len(grouped.step(epoch, step, 0)) for step in range(order.steps_per_epoch)] == [
        len(order.step(epoch, step, 0)) for step in range(order.steps_per_epoch)
    ]


def test_steps_of_grouped_rows_are_not_sorted_by_length() -> None:
    lengths = tuple(range(400))
    order = Order(rows=400, per_device=4, accumulation=1, world_size=1, seed=1, lengths=lengths)
    steps = [rows_of(order.step(0, step, 0)) for step in range(100)]
    assert all(max(rows) - min(rows) < 40 for rows in steps)
    longest = [max(rows) for rows in steps[:50]]
    assert longest != sorted(longest)
    assert steps != [rows_of(order.step(1, step, 0)) for step in range(100)]


def test_an_elastic_run_that_lacks_workers_makes_the_same_steps() -> None:
    whole = Order(rows=50, per_device=2, accumulation=3, world_size=4, seed=42)
    for world_size in (4, 3, 2, 1):
        elastic = replace(whole, world_size=world_size, workers=4)
        assert elastic.steps_per_epoch == whole.steps_per_epoch == 3
        assert elastic.batches_per_step == -(-24 // (2 * world_size))
        for step in range(3):
            rows = chain.from_iterable(rows_of(elastic.step(1, step, rank)) for rank in range(world_size))
            assert sorted(rows) == sorted(
                chain.from_iterable(rows_of(whole.step(1, step, rank)) for rank in range(4))
            )
            assert len({len(elastic.step(1, step, rank)) for rank in range(world_size)}) == 1


def test_the_order_is_frozen() -> None:
    """An adapter can be trained again only if these numbers never change."""
    order = Order(rows=11, per_device=2, accumulation=1, world_size=2, seed=42)
    assert order.permutation(0).tolist() == [5, 0, 6, 4, 2, 7, 3, 1, 8, 9, 10]
    assert order.permutation(1).tolist() == [3, 6, 5, 10, 1, 2, 9, 8, 0, 7, 4]
    assert replace(order, seed=7).permutation(0).tolist() == [5, 0, 1, 7, 3, 4, 9, 10, 6, 2, 8]
    assert [batch.rows for batch in order.epoch(0, 0)] == [(5, 6), (2, 3), (8, 10)]
    assert [batch.rows for batch in order.epoch(0, 1)] == [(0, 4), (7, 1), (9,)]


@thorough
@given(orders, st.integers(0, 5))
def test_every_row_once_and_ranks_in_step(order: Order, epoch: int) -> None:
    by_rank = ranks(order, epoch)
    assert sorted(chain.from_iterable(map(rows_of, by_rank))) == list(range(order.rows))
    assert {len(batches) for batches in by_rank} == {order.batches_per_epoch}
    for batches in by_rank:
        assert all(1 <= len(batch.rows) <= order.per_device for batch in batches)
        assert all(len(batch.rows) == 1 for batch in batches if batch.filler)
        assert all(0 <= row < order.rows for batch in batches for row in batch.rows)


@thorough
@given(orders, st.integers(0, 5))
def test_only_the_last_step_is_short(order: Order, epoch: int) -> None:
    permutation = order.permutation(epoch).tolist()
    for step in range(order.steps_per_epoch):
        parts = [order.step(epoch, step, rank) for rank in range(order.world_size)]
        rows = sorted(chain.from_iterable(map(rows_of, parts)))
        assert rows == sorted(permutation[step * order.rows_per_step : (step + 1) * order.rows_per_step])
        assert rows
        passes = {len(part) for part in parts}
        assert len(passes) == 1
        if step + 1 < order.steps_per_epoch:
            assert passes == {order.accumulation}
            assert all(len(batch.rows) == order.per_device for part in parts for batch in part)
        else:
            assert 1 <= passes.pop() <= order.accumulation


@thorough
@given(orders, st.data())
def test_resumed_at_any_step_the_rest_is_the_same(order: Order, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, order.steps_per_epoch))
    for whole, rest in zip(ranks(order, 2), ranks(order, 2, first), strict=True):
        assert rest == whole[len(whole) - len(rest) :]
        assert len(rest) == max(0, len(whole) - first * order.accumulation)


@thorough
@given(orders, st.integers(0, 3))
def test_the_order_depends_on_seed_and_epoch_alone(order: Order, epoch: int) -> None:
    other = replace(
        order,
        per_device=order.per_device + 1,
        accumulation=order.accumulation + 1,
        world_size=order.world_size + 1,
    )
    assert order.permutation(epoch).tolist() == other.permutation(epoch).tolist()


def test_epochs_and_seeds_differ() -> None:
    order = Order(rows=50, per_device=1, accumulation=1, world_size=1, seed=1)
    permutations = {
        tuple(replace(order, seed=seed).permutation(epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)
    }
    assert len(permutations) == 9


def test_a_rank_without_a_row_gets_a_filler() -> None:
    order = Order(rows=9, per_device=2, accumulation=2, world_size=2, seed=0)
    last = [order.step(0, 1, rank) for rank in range(2)]
    left = int(order.permutation(0)[8])
    assert last == [[BatchRows((left,))], [BatchRows((left,), filler=True)]]


@thorough
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5))
def test_evaluation_has_every_row_on_one_rank(rows: int, batch: int, world_size: int) -> None:
    by_rank = [evaluation_order(rows, batch, rank, world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(map(rows_of, by_rank))) == list(range(rows))
    assert {len(batches) for batches in by_rank} == {-(-rows // (batch * world_size))}
    assert all(1 <= len(each.rows) <= batch for batches in by_rank for each in batches)
    assert all(0 <= row < rows for batches in by_rank for each in batches for row in each.rows)


def test_one_rank_evaluates_in_the_order_of_the_rows() -> None:
    assert evaluation_order(5, 2, 0, 1) == [BatchRows((0, 1)), BatchRows((2, 3)), BatchRows((4,))]
    assert evaluation_order(5, 2, 1, 4) == [BatchRows((1,))]
    assert evaluation_order(1, 2, 1, 2) == [BatchRows((0,), filler=True)]


def test_shares_of_several_sources() -> None:
    mixture = Mixture((70, 30), (0.3, 0.7))
    order = Order(rows=100, per_device=8, accumulation=1, world_size=1, seed=5, mixture=mixture)
    epochs = [order.permutation(epoch) for epoch in range(10)]
    assert [(int((rows < 70).sum()), len(rows)) for rows in epochs] == [(30, 100)] * 10
    counts = np.bincount(np.concatenate(epochs), minlength=100)
    # 300 draws of 70 rows, 700 of 30: no row of a source comes twice more often than another.
    assert set(counts[:70]) == {4, 5}
    assert set(counts[70:]) == {23, 24}
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] == order.permutation(0)).all()
    assert (epochs[0] != Order(100, 8, 1, 1, seed=6, mixture=mixture).permutation(0)).any()
    trained = [row for batch in order.epoch(3, 0) for row in batch.rows]
    assert trained == list(epochs[3])


@pytest.mark.parametrize(
    ("sizes", "weights", "quotas"),
    [
        ((10, 10), (1, 1), [10, 10]),
        ((7, 3), (0.5, 0.5), [5, 5]),
        ((1, 2, 4), (1, 1, 1), [3, 2, 2]),
        ((0, 5), (0.9, 0.1), [0, 5]),  # a source that has no row to train on
        ((3, 997), (0.7, 0.3), [700, 300]),
    ],
)
def test_quotas_add_up(sizes: tuple[int, ...], weights: tuple[float, ...], quotas: list[int]) -> None:
    assert Mixture(sizes, weights).quotas() == quotas
    assert len(Mixture(sizes, weights).rows(2, seed=1)) == sum(sizes)
