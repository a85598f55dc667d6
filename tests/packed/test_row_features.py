"""Cached vision features: training is the same as with pixels, and the tower runs once for each row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from packed_kit import Packed, make_engine
from training_kit import difference, values_of

from vlmtune.data.encoded_example import ANSWER, IMAGE, EncodedExample
from vlmtune.data.input_format import ITEMS, InputFormat, TensorLayout
from vlmtune.data.store import Store
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.packed.layers import RowAdapters
from vlmtune.packed.length_buckets import LengthBuckets
from vlmtune.packed.packed_batch import PackedRow
from vlmtune.packed.packed_model import PackedModel
from vlmtune.packed.row_features import PackedVisionFeatures

pytestmark = pytest.mark.timeout(120)

TOWER = {"llava": "vision_tower", "mllama": "vision_model"}
TRIALS: dict[str, dict[str, Any]] = {
    "a": {"lora_r": 4, "per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": 30},
    "b": {"lora_r": 8, "per_device_train_batch_size": 3, "num_train_epochs": 2, "max_steps": 30},
}


def run(
    rows: str, stores: dict[str, Store], models: Path, folder: Path, limit: float | None = None, **shared: Any
) -> tuple[Packed, list[int]]:
    """Two trials over `rows`, and how many rows went through the vision tower in each of its calls. `limit`:
    of the features' bytes."""
    name = rows.split()[1]
    shared = {"self_check": False, **shared}  # it would compute the features of two rows
    packed = make_engine(values_of(stores[rows], models / name, **shared), stores[rows], folder)
    if limit is not None:
        packed.engine.model.features.cache.max_bytes = limit
    calls: list[int] = []
    tower = getattr(packed.engine.model.base.base_model, TOWER[name])
    tower.register_forward_hook(
        lambda _, args, kwargs, __: calls.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    for trial, values in TRIALS.items():
        packed.join(trial, values_of(stores[rows], models / name, **shared, **values))
    packed.run()
    packed.close()
    return packed, calls


@pytest.mark.parametrize("rows", ["mall llava", "mixed llava", "mixed mllama"])
def test_training_with_cached_features_is_training_with_pixels(
    rows: str, stores: dict[str, Store], models: Path, tmp_path: Path
):
    cached, once = run(rows, stores, models, tmp_path / "cached")
    pixels, again = run(rows, stores, models, tmp_path / "pixels", limit=0)
    features = cached.engine.model.features.cache
    tried = 0 if rows.endswith("mllama") else 1  # with pixels too: what the decoder gets is compared
    assert len(once) == len(features.rows) + tried > tried, "each row by itself, and once"
    assert len(once) < sum(again) / 4
    assert features.bytes == sum(
        one.numel() * one.element_size() for leaves in features.rows.values() for one in leaves
    )
    for trial in TRIALS:
        assert cached.losses(trial) == pytest.approx(pixels.losses(trial), rel=1e-4)
        assert difference(cached.adapter(trial), pixels.adapter(trial)) < 1e-5


def test_rows_beyond_the_limit_are_computed_each_time_and_pixels_are_used_where_most_are(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    rows = "mall llava"
    all_cached, once = run(rows, stores, models, tmp_path / "all")
    size = all_cached.engine.model.features.cache.bytes
    some, more = run(rows, stores, models, tmp_path / "some", limit=size * 0.7)
    assert 0 < some.engine.model.features.cache.bytes <= size * 0.7
    assert len(once) < len(more)
    assert set(more) == {1}
    few, calls = run(rows, stores, models, tmp_path / "few", limit=size * 0.2)
    assert few.engine.model.features.cache.bytes == 0
    assert max(calls) > 1
    for other in (some, few):
        assert difference(other.adapter("a"), all_cached.adapter("a")) < 1e-5


def test_features_are_dropped_first_when_memory_runs_out(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    roomy, _ = run("mall llava", stores, models, tmp_path / "roomy")
    gradients, sizes = RowAdapters.gradients, []

    def full_once(self: RowAdapters) -> torch.Tensor:
        sizes.append(len(self.flat))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("injected after the backward pass")
        return gradients(self)

    monkeypatch.setattr(RowAdapters, "gradients", full_once)
    full, _ = run("mall llava", stores, models, tmp_path / "full")
    assert full.engine.model.features.cache.bytes == 0
    assert sizes[2] == sizes[3], "the same rows again, all together"
    for trial in TRIALS:
        assert difference(full.adapter(trial), roomy.adapter(trial)) < 1e-5


def test_features_of_images_of_different_size(stores: dict[str, Store]) -> None:
    """Qwen2.5-VL's, whose larger images have more tokens."""
    torch.manual_seed(0)
    width, image_token = 64, 7
    base = tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={
                "hidden_size": width,
                "intermediate_size": width,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 2,
                "vocab_size": 50,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "hidden_size": width,
                "intermediate_size": width,
                "depth": 2,
                "num_heads": 4,
                "out_hidden_size": width,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            image_token_id=image_token,
            video_token_id=8,
            vision_start_token_id=9,
            vision_end_token_id=10,
        )
    )
    layouts = {name: TensorLayout(ITEMS) for name in ("pixel_values", "image_grid_thw")}
    meta = replace(stores["mall llava"].meta, input_format=InputFormat(layouts=layouts), pad_token_id=0)
    rows = [image_row(number, side, image_token) for number, side in enumerate((2, 4, 4))]
    features = PackedVisionFeatures(base, meta, total_rows=3, max_bytes=1e9, note=print)
    plan = StepPlan(dequantized=False, checkpointing=False, micro_batch_size=3, compiled=False)
    model = PackedModel(AcceleratedStep(base, plan, print), meta, 1000, LengthBuckets((64,)), features)
    cached = model.losses(rows)
    assert sorted(len(one) for (one,) in features.cache.rows.values()) == [1, 4, 4]
    features.disable()
    pixels = model.losses(rows)
    for row in rows:
        assert cached.rows[id(row)][0].item() == pytest.approx(pixels.rows[id(row)][0].item(), rel=1e-5)
    assert cached.rows[id(rows[1])][0] != cached.rows[id(rows[2])][0], "the same text with another image"


def image_row(number: int, side: int, image_token: int) -> PackedRow:
    """A row with an image of `side` times `side` patches, four to a token."""
    count = side * side // 4
    ids = np.array([9, *[image_token] * count, 10, *range(20, 32 - count)], dtype=np.int32)
    kinds = np.where(ids >= 20, ANSWER, IMAGE).astype(np.uint8)
    random = np.random.RandomState(number)
    tensors = {
        "pixel_values": random.randn(side * side, 3 * 2 * 14 * 14).astype(np.float32),
        "image_grid_thw": np.array([[1, side, side]]),
        "mm_token_type_ids": (ids == image_token).astype(np.int64)[None],
    }
    return PackedRow(
        number, number, EncodedExample(ids, kinds, tensors, {"mm_token_type_ids": 1}), torch.zeros(0), 1.0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
@pytest.mark.parametrize("rows", ["mall llava", "mixed mllama"])
def test_cached_features_on_a_gpu(rows: str, stores: dict[str, Store], models: Path, tmp_path: Path):
    """With a captured tower, whose output is copied before it runs again."""
    shared = {"use_cpu": False, "dtype": "float32", "torch_compile": False}
    cached, once = run(rows, stores, models, tmp_path / "cached", **shared)
    pixels, _ = run(rows, stores, models, tmp_path / "pixels", limit=0, **shared)
    assert len(cached.engine.model.features.cache.rows) > 0
    assert len(once) <= len(cached.engine.model.features.cache.rows), "captured, its hooks do not run"
    for trial in TRIALS:
        assert cached.losses(trial) == pytest.approx(pixels.losses(trial), rel=1e-4)
        assert difference(cached.adapter(trial), pixels.adapter(trial)) < 1e-3
