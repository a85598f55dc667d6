"""How many trials train in an engine, and what it plans for."""

from pathlib import Path
from typing import Any

import pytest
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.packed import build
from vlmtune.packed.build import MAX_TRIALS, MIN_TRIALS, build_model, trials_at_once
from vlmtune.packed.length_buckets import LengthBuckets


def settings_of(stores: dict[str, Store], models: Path, **changes: Any) -> Settings:
    return Settings.from_flags(values_of(stores["mall llava"], models / "llava", **changes))


def test_large_batches_need_fewer_trials_to_keep_a_device_busy(
    stores: dict[str, Store], models: Path
) -> None:
    counts = {
        batch: trials_at_once(settings_of(stores, models, per_device_train_batch_size=batch), store, "cuda")
        for store in [stores["mall llava"]]
        for batch in (1, 16, 1000)
    }
    assert counts[1] == MAX_TRIALS
    assert counts[1] >= counts[16] >= counts[1000] == MIN_TRIALS


def test_a_pass_has_room_for_the_rows_of_all_trials_that_fit(
    stores: dict[str, Store], models: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    store, notes, loads = stores["mall llava"], [], []
    plan_step = build.plan_step

    def two_fit(*args: Any, packed_adapters: int, **load: Any) -> Any:
        loads.append((packed_adapters, load["lora_rank"], load["batch"]))
        if packed_adapters > 2:
            raise DoesNotFitError("injected")
        return plan_step(*args, packed_adapters=packed_adapters, **load)

    monkeypatch.setattr(build, "plan_step", two_fit)
    settings = settings_of(stores, models, per_device_train_batch_size=3)
    model, trials = build_model(settings, store, 8, 16, notes.append)
    assert trials == 2
    assert [packed for packed, _, _ in loads] == [8, 4, 2]
    assert {rank for _, rank, _ in loads} == {16}
    longest = LengthBuckets.of_rows(store.column("tokens"), 6)(
        int(store.column("tokens")[store.rows_of("train")].max())
    )
    assert model.max_tokens == loads[-1][2] * longest == 6 * longest
    assert notes == ["Memory    fits 2 of 8 trials at once; the others wait"]


def test_an_engine_without_memory_for_one_trial_cannot_be_built(
    stores: dict[str, Store], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_fits(*args: Any, **load: Any) -> Any:
        raise DoesNotFitError("injected")

    monkeypatch.setattr(build, "plan_step", none_fits)
    with pytest.raises(DoesNotFitError, match="injected"):
        build_model(settings_of(stores, models), stores["mall llava"], 4, 8, print)
