"""The answers to a few fixed evaluation rows that the page of a search shows."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import answers
from vlmtune.evaluation.live_answers import MAX_CHARACTERS, LiveAnswers, shortened
from vlmtune.evaluation.objective import sampled_rows
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef

SPACE = {"lora_r": {"choice": [2, 4]}}


def test_only_the_trials_of_a_search_answer(stores: dict[str, Store], models: Path) -> None:
    values = values_of(
        stores["mall llava"], models / "llava", search_space=SPACE, live_answers=3, max_new_tokens=100
    )
    settings = Settings.from_flags(values)
    live = LiveAnswers.of(settings)
    assert live is not None and (live.rows, live.max_new_tokens) == (3, 32)
    assert LiveAnswers.of(settings.replace(live_answers=0)) is None
    assert LiveAnswers.of(settings.replace(search_space=None)) is None


@pytest.mark.parametrize(
    ("spent", "due"),
    [
        ({}, True),
        ({"seconds": 1.0, "last_seconds": 0.9}, True),
        ({"seconds": 1.0, "last_seconds": 1.1}, False),
        ({"possible": False}, False),
    ],
)
def test_they_take_a_small_share_of_the_time(spent: dict[str, Any], due: bool) -> None:
    assert LiveAnswers(3, 8, 0, started=time.monotonic() - 100, **spent).due is due


def test_the_same_rows_are_answered_as_by_an_evaluation(stores: dict[str, Store], models: Path) -> None:
    store, ref = stores["mall llava"], ModelRef(str(models / "llava"))
    model = load_base(ref, quantization="none", dtype=None, device=torch.device("cpu"))
    processor, live = ref.processor(), LiveAnswers(2, 4, seed=7)
    rows = [int(row) for row in sampled_rows(store, 7)[:2]]
    texts = answers(model, processor, store, rows, max_new_tokens=4, batch_size=2)
    found = live.generate(model, processor, store, Store.read)
    assert [row["answer"] for row in found] == texts and live.seconds > 0
    assert all(row["question"] and row["reference"] for row in found)
    other_rows = dict(zip(rows, texts, strict=True)) | {max(store.rows_of("eval")) + 1: "another"}
    assert live.reuse(processor, store, Store.read, other_rows) == found
    assert live.reuse(processor, store, Store.read, {rows[1]: texts[1]}) == found[1:]


def test_too_little_memory_ends_them(stores: dict[str, Store], models: Path) -> None:
    store, ref = stores["mall llava"], ModelRef(str(models / "llava"))
    model = load_base(ref, quantization="none", dtype=None, device=torch.device("cpu"))
    live = LiveAnswers(2, 4, seed=0)

    def read(store: Store, rows: Any) -> Any:
        raise torch.OutOfMemoryError

    assert live.generate(model, ref.processor(), store, read) == [] and not live.due


def test_long_texts_are_cut() -> None:
    assert shortened("a" * MAX_CHARACTERS) == "a" * MAX_CHARACTERS
    assert shortened("a" * 10_000) == "a" * (MAX_CHARACTERS - 1) + "…"
