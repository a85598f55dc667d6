"""Who stands on which side: by content and seed alone, no group on two sides, as many rows as were asked
for."""

from collections import Counter, defaultdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmtune.data.split import EVAL, TEST, TRAIN, connected_groups, split
from vlmtune.errors import DataError

thorough = settings(max_examples=150, deadline=None, derandomize=True)
# Rows that name up to three of twelve images: chains of shared images form.
row_keys = st.lists(
    st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=3), min_size=1, max_size=12
)


def test_rows_that_share_an_image_are_one_group() -> None:
    assert connected_groups([["b"], ["c"], ["b"]]) == ["b", "c", "b"]


def test_a_chain_of_shared_images_is_one_group() -> None:
    groups = connected_groups([["d", "e"], ["x"], ["e", "f"], ["f", "a"], ["y", "x"]])
    assert groups == ["a", "x", "a", "a", "x"]


@thorough
@given(row_keys)
def test_groups_are_the_connected_parts(keys: list[list[str]]) -> None:
    groups = connected_groups(keys)
    reached = [set(row) for row in keys]
    for _ in keys:  # the slow way: grow each row's images until nothing is added
        reached = [set().union(*(other for other in reached if other & mine)) for mine in reached]
    assert groups == [min(images) for images in reached]


@thorough
@given(row_keys, st.data(), st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(keys: list[list[str]], data: st.DataObject, seed: int) -> None:
    places = data.draw(st.permutations(range(len(keys))))
    groups, moved = connected_groups(keys), connected_groups([keys[place][::-1] for place in places])
    assert moved == [groups[place] for place in places]
    assume(len(set(groups)) >= 3)
    options = {"eval_fraction": 0.2, "test_fraction": 0.2, "seed": seed}
    try:
        sides = split(groups, **options)
    except DataError:
        with pytest.raises(DataError):
            split(moved, **options)
    else:
        assert split(moved, **options) == [sides[place] for place in places]


@thorough
@given(st.lists(st.integers(0, 30), min_size=40, max_size=120), st.integers(0, 99))
def test_no_group_stands_on_two_sides_and_shares_are_kept(numbers: list[int], seed: int) -> None:
    groups = [str(number) for number in numbers]
    assume(len(set(groups)) >= 12)
    sides = split(groups, eval_fraction=0.2, test_fraction=0.1, seed=seed)
    by_group = defaultdict(set)
    for group, side in zip(groups, sides, strict=True):
        by_group[group].add(side)
    assert all(len(on) == 1 for on in by_group.values())
    largest = max(Counter(groups).values())
    for side, fraction in ((EVAL, 0.2), (TEST, 0.1)):
        wanted = round(fraction * len(groups))
        assert wanted <= sides.count(side) < wanted + largest


def test_single_rows_are_split_exactly() -> None:
    sides = split([f"{number:03d}" for number in range(200)], eval_fraction=0.1, test_fraction=0.05, seed=42)
    assert Counter(sides) == {TRAIN: 170, EVAL: 20, TEST: 10}


def test_a_small_share_is_at_least_one_row() -> None:
    assert Counter(split(list("abcde"), eval_fraction=0.01, test_fraction=0.01, seed=42)) == {
        TRAIN: 3,
        EVAL: 1,
        TEST: 1,
    }


def test_nothing_is_held_out_unasked() -> None:
    assert split(list("abc"), eval_fraction=0.0, test_fraction=0.0, seed=42) == [TRAIN] * 3
    assert set(split(list("abc"), eval_fraction=0.3, test_fraction=0.0, seed=42)) == {TRAIN, EVAL}


def test_the_split_is_frozen() -> None:
    """Headline numbers are compared across versions on the same test rows."""
    sides = split([f"{number:x}" for number in range(12)], eval_fraction=0.25, test_fraction=0.25, seed=42)
    assert [number for number, side in enumerate(sides) if side == TEST] == [1, 6, 9]
    assert [number for number, side in enumerate(sides) if side == EVAL] == [2, 4, 10]


def test_seeds_differ() -> None:
    groups = [f"{number:03d}" for number in range(60)]
    assert (
        len({tuple(split(groups, eval_fraction=0.2, test_fraction=0.2, seed=seed)) for seed in range(5)}) == 5
    )


def test_a_larger_eval_share_keeps_the_test_rows() -> None:
    groups = [f"{number:03d}" for number in range(60)]
    small, large = (split(groups, eval_fraction=share, test_fraction=0.1, seed=3) for share in (0.1, 0.3))
    assert [side == TEST for side in small] == [side == TEST for side in large]


@pytest.mark.parametrize(
    ("groups", "eval_fraction", "test_fraction"),
    [("aaaa", 0.1, 0.0), ("ab", 0.1, 0.1), ("aaab", 0.0, 0.9), ("a", 0.2, 0.2)],
)
def test_a_side_that_would_be_empty_is_an_error(
    groups: str, eval_fraction: float, test_fraction: float
) -> None:
    reason = f"{len(groups)} rows in {len(set(groups))} groups? .* no row for train"
    message = reason
    with pytest.raises(DataError, match=message):
        split(list(groups), eval_fraction=eval_fraction, test_fraction=test_fraction, seed=42)
