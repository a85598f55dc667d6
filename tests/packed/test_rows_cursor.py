"""Which training rows of a trial come next, from any step on and on any worker."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.order import Order
from vlmtune.packed.rows_cursor import RowsCursor
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard

NUMBERS = np.arange(100, 111)  # of 11 training rows in a store


def make_cursor(
    first_step: int = 0,
    *,
    per_device: int = 2,
    accumulation: int = 2,
    shard: WorkerShard = SINGLE_WORKER,
    max_steps: int = 7,
) -> RowsCursor:
    order = Order(len(NUMBERS), per_device, accumulation, shard.world_size, seed=3)
    return RowsCursor(NUMBERS, order, shard, first_step=first_step, max_steps=max_steps)


def steps_of(cursor: RowsCursor) -> list[list[tuple[list[int], list[int]]]]:
    """The rows and positions of each micro-batch, by step, until there are none left."""
    steps: list[list[tuple[list[int], list[int]]]] = [[]]
    while cursor.rest_of_step():
        steps[-1].append((cursor.next_batch(), cursor.positions()))
        if cursor.advance():
            steps.append([])
    return steps[:-1]


def test_an_epoch_has_every_row_once_and_its_last_step_what_is_left() -> None:
    steps = steps_of(make_cursor(max_steps=3))
    assert [[len(rows) for rows, _ in step] for step in steps] == [[2, 2], [2, 2], [2, 1]]
    assert sorted(row for step in steps for rows, _ in step for row in rows) == NUMBERS.tolist()
    assert [position for _, positions in steps[0] for position in positions] == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_cursor_resumes_at_any_step(
    first: int, per_device: int, accumulation: int, world_size: int
) -> None:
    for rank in range(world_size):
        options = {
            "per_device": per_device,
            "accumulation": accumulation,
            "shard": WorkerShard(rank, world_size),
        }
        whole = make_cursor(**options)
        for _ in range(first):
            while not whole.advance():
                pass
        resumed = make_cursor(first, **options)
        assert resumed.following_step() == whole.following_step()
        while whole.rest_of_step():
            assert resumed.rest_of_step() == whole.rest_of_step()
            assert (resumed.next_batch(), resumed.positions()) == (whole.next_batch(), whole.positions())
            assert resumed.advance() == whole.advance()


def test_the_rest_of_a_step_shrinks_and_the_following_one_is_known() -> None:
    cursor = make_cursor()
    first, following = cursor.rest_of_step(), cursor.following_step()
    assert (len(first), len(following)) == (4, 4)
    assert not cursor.advance()
    assert cursor.rest_of_step() == first[2:] == cursor.next_batch()
    assert cursor.advance()
    assert cursor.rest_of_step() == following


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_have_the_rows_of_one_process_at_the_same_places(world_size: int) -> None:
    """So that dropout, which follows from the position, does not depend on the number of workers."""
    alone = [
        dict(zip(*pairs, strict=True)) for ((*pairs,),) in steps_of(make_cursor(per_device=6, accumulation=1))
    ]
    options = {"per_device": 6 // world_size, "accumulation": 1}
    shards = [
        steps_of(make_cursor(shard=WorkerShard(rank, world_size), **options)) for rank in range(world_size)
    ]
    for step, expected in enumerate(alone):
        together: dict[int, int] = {}
        for shard in shards:
            for rows, positions in shard[step] if step < len(shard) else []:
                together |= dict(zip(rows, positions, strict=True))
        assert together == expected


def test_a_worker_without_rows_makes_the_step_too() -> None:
    """Of 11 rows in steps of 5 the last step has one, which the first worker gets."""
    cursor = make_cursor(2, per_device=1, accumulation=1, shard=WorkerShard(4, 5), max_steps=3)
    assert cursor.next_batch() == cursor.positions() == []
    assert cursor.advance()
