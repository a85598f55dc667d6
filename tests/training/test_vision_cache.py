"""Training alone with cached vision features is training with pixels, and a row's image is read once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_kit import Run, difference

from vlmtune.model import fast
from vlmtune.training import loop, vision_cache

RunLoop = Callable[..., Run]


@pytest.fixture
def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of each call of a vision tower."""
    calls: list[int] = []
    disable = fast.disable_vision_gradient

    def count(model: Any) -> None:
        tower = fast.decoder_and_other_parts(model)[1]
        tower.register_forward_hook(
            lambda _, args, kwargs, __: calls.append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        )
        disable(model)

    monkeypatch.setattr("vlmtune.model.step.disable_vision_gradient", count)
    return calls


@pytest.mark.parametrize("rows", ["mixed llava", "mixed mllama"])
def test_cached_features_train_as_pixels_do(
    rows: str, run_loop: RunLoop, tower_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 9, "eval_steps": 3, "learning_rate": 1e-2, "quantization": "none"}
    options["self_check"] = False  # it sends two rows through the tower at once
    cached = run_loop(rows, **options)
    rows_seen, calls = sum(tower_calls), len(tower_calls)
    tower_calls.clear()
    monkeypatch.setattr(loop, "room_for_features", lambda *_: 0.0)
    pixels = run_loop(rows, **options)
    assert rows_seen == calls < sum(tower_calls) / 2, "each row by itself, and not again"
    assert cached.losses() == pytest.approx(pixels.losses(), rel=1e-4)
    assert difference(cached.adapter(), pixels.adapter()) < 1e-4
    losses = [[report["eval_loss"] for report in run.reports] for run in (cached, pixels)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_tower_that_trains_is_not_cached(run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[vision_cache.VisionCache] = []
    make = vision_cache.VisionCache.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(vision_cache.VisionCache, "__init__", remember)
    run_loop("mall llava", max_steps=12, lora_vision=True)
    assert caches[0].features.rows == {}
    assert caches[0].features.max_bytes == 0


def test_features_are_freed_before_rows_are_halved(
    run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_loop("mall llava", max_steps=12, quantization="none")
    inputs, failures = vision_cache.VisionCache.inputs, []

    def full_once(self: Any, batch: Any) -> Any:
        if not failures and len(self.features.rows) > 4:
            failures.append(len(self.features.rows))
            raise torch.OutOfMemoryError
        return inputs(self, batch)

    monkeypatch.setattr(vision_cache.VisionCache, "inputs", full_once)
    freed = run_loop("mall llava", max_steps=12, quantization="none")
    assert failures
    assert not any("rows at a time" in step.get("note", "") for step in freed.steps)
    assert difference(freed.adapter(), plain.adapter()) < 1e-4


def test_features_that_do_not_all_fit_are_not_cached(
    run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "room_for_features", lambda *_: 20_000.0)
    run = run_loop("mixed llava", max_steps=6, quantization="none")
    notes = [step["note"] for step in run.steps if "note" in step]
    assert len([note for note in notes if "vision features are not cached: 16 rows take" in note]) == 1


def test_one_epoch_caches_nothing(run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.model.vision_features.VisionFeatures.compute", pytest.fail)
    run_loop("mixed llava", max_steps=2, quantization="none")
