from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.tiny_qwen import batch_of_two, qwen2_5_vl, qwen3_vl, rows_alone
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.model.decoder_inputs import decoder_difference
from vlmtune.model.deepstack import use_dense_deepstack
from vlmtune.model.tower_output import OutputLayout
from vlmtune.model.vision_attention import use_varlen_attention
from vlmtune.model.vision_features import VisionFeatures, room_for_features, without_pixels

TOKENS = [12, 8]  # of the images of `batch_of_two`


def reversed_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0) for name, tensor in without_pixels(batch).items()}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("build", [qwen2_5_vl, qwen3_vl])
def test_features_in_place_of_pixels_give_the_same_logits_in_any_order(
    build: Callable[[], Any], accelerated: bool
) -> None:
    model, batch = build(), batch_of_two()
    with torch.no_grad():
        expected = model(**batch).logits
    if accelerated:
        use_varlen_attention(model)
        use_dense_deepstack(model.get_decoder())
    features = VisionFeatures(model, max_bytes=1e9, note=pytest.fail)
    computed = [features.compute(*row) for row in zip([5, 9], TOKENS, rows_alone(batch), strict=True)]
    cached = features.cached([9, 5])
    assert cached is not None
    with torch.no_grad():
        at_once = model(**without_pixels(batch), **features.inputs(computed)).logits  # type: ignore[arg-type]
        later = model(**reversed_rows(batch), **features.inputs(cached)).logits
    torch.testing.assert_close(at_once, expected)
    torch.testing.assert_close(later.flip(0), expected)
    assert features.cached([5, 7]) is None
    positions = features.position_ids([(5, 24), (9, 24)], 26)
    assert positions["position_ids"].shape == (3, 2, 26)
    with torch.no_grad():
        model.model.rope_deltas = None
        model.model.compute_3d_position_ids = pytest.fail
        rest = without_pixels(batch).items()
        padded = {name: torch.nn.functional.pad(tensor, (0, 2)) for name, tensor in rest}
        padded["image_grid_thw"] = batch["image_grid_thw"]
        given = model(**padded, **features.inputs(computed), **positions).logits  # type: ignore[arg-type]
    torch.testing.assert_close(given[:, :24], expected)
    assert features.position_ids([(5, 24), (9, 20)], 26) == {}
    levels = 1 if build is qwen2_5_vl else 3
    assert features.bytes == sum(TOKENS) * 64 * 4 * levels


def test_only_what_fits_is_cached_and_all_of_it_can_be_dropped() -> None:
    model, batch = qwen2_5_vl(), batch_of_two()
    features = VisionFeatures(model, max_bytes=TOKENS[0] * 64 * 4, note=pytest.fail)
    rows = rows_alone(batch)
    assert features.compute(0, TOKENS[0], rows[0]) is not None
    assert features.compute(1, TOKENS[1], rows[1]) is not None
    assert features.cached([0]) is not None
    assert features.cached([1]) is None
    assert features.disable()
    assert features.cached([0]) is None
    assert features.compute(0, TOKENS[0], rows[0]) is None
    assert not features.disable()


def test_a_model_whose_decoder_would_get_something_else_keeps_its_pixels() -> None:
    model, batch, notes = qwen3_vl(), batch_of_two(), []
    calls = []

    def change_with_every_call(_: Any, __: Any, output: Any) -> None:
        calls.append(output)
        output.pooler_output = output.pooler_output + len(calls)

    model.model.visual.register_forward_hook(change_with_every_call)
    features = VisionFeatures(model, max_bytes=1e9, note=notes.append)
    assert features.compute(0, TOKENS[0], rows_alone(batch)[0]) is None
    assert features.max_bytes == 0
    assert "the decoder would get other inputs" in notes[0]


def test_an_output_that_cannot_be_split_by_rows_keeps_its_pixels() -> None:
    model, batch, notes = qwen2_5_vl(), batch_of_two(), []
    features = VisionFeatures(model, max_bytes=1e9, note=notes.append)
    assert features.compute(0, 13, rows_alone(batch)[0]) is None
    assert notes == [
        "vision features are not cached, pixels go through the tower in every epoch: "
        "the tower gives 12 vectors for 13 image tokens"
    ]


def test_the_decoder_is_compared_without_running() -> None:
    model, batch = qwen3_vl(), batch_of_two()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    assert decoder_difference(model, batch, batch) == 0
    changed = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert decoder_difference(model, batch, changed) > 1e-3
    assert decoder_difference(model, batch, {**batch, "unknown": batch["input_ids"]}) in (0, float("inf"))
    assert decoder_difference(model, batch, without_pixels(batch)) == float("inf")


def test_room() -> None:
    assert room_for_features(torch.device("cuda"), 10.0) == 8
    assert room_for_features(torch.device("cpu"), 0.0) == 2 * 2**30


@pytest.mark.parametrize("sequence", [list, tuple])
def test_tensors_of_images_and_of_levels_are_told_apart_by_their_tokens(sequence: Any) -> None:
    output = BaseModelOutputWithPooling(pooler_output=sequence([torch.zeros(3, 2), torch.ones(3, 2)]))
    images, (joined,) = OutputLayout.of(output, tokens=6)
    assert images.fields == {"pooler_output": ("images", 1)}
    assert joined.shape == (6, 2)
    levels, leaves = OutputLayout.of(output, tokens=3)
    assert levels.fields == {"pooler_output": ("levels", 2)}
    assert [tuple(leaf.shape) for leaf in leaves] == [(3, 2), (3, 2)]
