"""What searching was worth on test rows: which rows, which metrics, what is said where there is no answer,
and a tiny real comparison."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from training_kit import values_of

from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.data.cache import prepare_store
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.model.base import load_base
from vlmtune.model.lora import attach, lora_config, save_adapter
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef
from vlmtune.search.comparison import (
    BASE,
    BASELINE,
    BEST,
    MAX_ROWS,
    NO_TEST_ROWS,
    RECIPE,
    ComparedRow,
    Comparison,
    NoComparison,
    answer_limit,
    compare,
    compare_answers,
    sample_rows,
    worst_first,
)


def answered(row: int, reference: str, **answers: str) -> ComparedRow:
    return ComparedRow(row, "How many?", reference, answers)


COUNTS = [
    answered(0, "3", base="0", own="3", best="3"),
    answered(1, "5", base="0", own="3", best="5"),
    answered(2, "4", base="4", own="2", best="6"),
    answered(3, "2", base="many", own="2", best="2"),
]
GROUPS = ["a", "b", "c", "d"]


def test_numbers_are_compared_by_their_errors() -> None:
    found = compare_answers(COUNTS, GROUPS, 4, 0)
    assert found.metrics == ["exact_match", "mae", "within_1", "number_rate"]
    assert {model: values["exact_match"].value for model, values in found.models.items()} == {
        BASE: 0.25,
        BASELINE: 0.5,
        BEST: 0.75,
    }
    assert {other: values["exact_match"].value for other, values in found.gains.items()} == {
        BASE: 0.5,
        BASELINE: 0.25,
    }
    assert found.models[BEST]["mae"].value == pytest.approx(0.5)
    low, high = found.gains[BASE]["exact_match"].low, found.gains[BASE]["exact_match"].high
    assert low is not None and high is not None and low <= 0.5 <= high
    assert found.summary_line() == (
        "4 rows that no trial saw: exact match 25.0 % → 75.0 % (baseline: 50.0 %); "
        "off by 2.5 → 0.5 on average (25.0 % → 0.0 % of the answers have no number and count as 0)"
    )
    assert found.verdict_lines() == [
        "against the base: no measurable difference (+50 points, -50 to +100, 4 rows)",
        "against the baseline: no measurable difference (+25 points, +0 to +75, 4 rows)",
        "4 test rows cannot tell much",
    ]
    assert found.model_card_rows()["exact match, 4 test rows"] == "75.0 % (base: 25.0 %)"
    assert found.to_dict()["best_minus"]["own"]["exact_match"]["value"] == 0.25


def test_answers_without_a_number_are_not_mentioned_where_there_are_none() -> None:
    line = compare_answers(COUNTS[:3], GROUPS[:3], 3, 0).summary_line()
    assert line.endswith("off by 2.7 → 0.67 on average")


def test_answers_may_be_as_long_as_the_longest_reference_and_half_of_it() -> None:
    lengths = np.array([5, 90, 300])
    store: Any = SimpleNamespace(column=lambda name: {"answer_tokens": lengths}[name])
    assert answer_limit(store, np.array([0])) == 64
    assert answer_limit(store, np.array([0, 1])) == 135
    assert answer_limit(store, np.array([0, 2])) == 450


def test_texts_are_compared_by_their_words_and_a_search_whose_best_is_its_first_has_two_models() -> None:
    rows = [
        answered(0, "a red door", base="a door", best="a red door"),
        answered(1, "no", base="yes", best="no"),
    ]
    found = compare_answers(rows, ["a", "b"], 9, 0)
    assert found.metrics == ["exact_match", "token_f1"]
    assert set(found.models) == {BEST, BASE} and set(found.gains) == {BASE}
    assert (
        found.summary_line()
        == "2 of the 9 rows that no trial saw: exact match 0.0 % → 100.0 %; token f1 33.3 % → 100.0 %"
    )


@pytest.mark.parametrize("reference", ["36.6", "2019"])
def test_numbers_that_are_not_counts_are_not_off_by_so_many(reference: str) -> None:
    rows = [answered(row, reference, base="1", best=reference) for row in range(3)]
    found = compare_answers(rows, ["a", "b", "c"], 3, 0)
    assert found.metrics == ["exact_match", "mae", "number_rate"] and "off by" not in found.summary_line()
    assert "mae" in found.summary_line()


def test_worst_first_is_by_the_best_adapters_error() -> None:
    rows = [*COUNTS, answered(4, "9", base="9", best="8")]
    order = [row.row for row in worst_first(rows, ["exact_match", "mae", "within_1"], seed=0)]
    assert order[:2] == [2, 4]
    assert sorted(order[2:]) == [0, 1, 3]
    assert order == [row.row for row in worst_first(rows, ["exact_match", "mae", "within_1"], seed=0)]


def test_many_test_rows_are_drawn_from_the_same_way_each_time() -> None:
    few, many = np.arange(7), np.arange(3 * MAX_ROWS)
    assert sample_rows(few, 1).tolist() == few.tolist()
    drawn = sample_rows(many, 1)
    assert len(set(drawn.tolist())) == MAX_ROWS and (np.diff(drawn) > 0).all()
    assert drawn.tolist() == sample_rows(many, 1).tolist() != sample_rows(many, 2).tolist()


@pytest.fixture(scope="module")
def held_out(
    models: Path, mall: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Store, Settings]]:
    """A store with a few test rows, and settings to answer them with."""
    connect()
    store = prepare_store(
        DataSource(str(mall), ModelRef(str(models / "llava")), eval_fraction=0.2, test_fraction=0.1),
        str(tmp_path_factory.mktemp("cache")),
    )
    yield store, Settings.from_flags(values_of(store, models / "llava"))
    ray.shutdown()


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random adapter, whose answers are not the base's."""
    folder = tmp_path_factory.mktemp("adapter")
    base = load_base(
        ModelRef(str(models / "llava")), quantization="nf4", dtype="float32", device=torch.device("cpu")
    )
    targets = target_modules(base, None, lora_vision=False)
    model = attach(base, lora_config(base, r=4, alpha=64, dropout=0.0, target_modules=targets), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, folder)
    return folder


def test_base_and_adapters_answer_every_test_row(held_out: tuple[Store, Settings], adapter: Path) -> None:
    store, settings = held_out
    others = {BASELINE: adapter.as_uri(), RECIPE: str(adapter)}
    found = compare(settings, store, connect(), str(adapter), others)
    assert isinstance(found, Comparison)
    rows = store.rows_of("test").tolist()
    assert [row.row for row in found.rows] == rows and found.total == len(rows) > 1
    assert all(row.answers[BEST] == row.answers[BASELINE] == row.answers[RECIPE] for row in found.rows), (
        "one adapter, from a folder and from a URI"
    )
    assert any(row.answers[BEST] != row.answers[BASE] for row in found.rows)
    assert all(row.question and row.reference for row in found.rows)


def test_an_adapter_that_cannot_answer_is_said_and_ends_nothing(
    held_out: tuple[Store, Settings], tmp_path: Path
) -> None:
    store, settings = held_out
    found = compare(settings, store, connect(), str(tmp_path), {})
    assert isinstance(found, NoComparison)
    assert (
        found.reason.startswith("the test rows could not be answered: ")
        and "adapter" in found.reason
        and "\n" not in found.reason
    )


def test_nothing_is_compared_without_test_rows(
    held_out: tuple[Store, Settings], stores: dict[str, Store]
) -> None:
    assert compare(held_out[1], stores["mall llava"], connect(), "nowhere", {}) == NoComparison(NO_TEST_ROWS)
