import torch
from model.tiny_qwen import batch_of_two, qwen2_5_vl, qwen3_vl

from vlmtune.model.deepstack import use_dense_deepstack


def test_features_at_all_positions_give_the_same_losses_and_gradients() -> None:
    results = []
    for dense in (False, True):
        model = qwen3_vl()
        assert use_dense_deepstack(model.get_decoder()) if dense else True
        batch = batch_of_two()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        results.append((loss.detach(), model.get_decoder().layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_decoder_gets_tensors_of_one_shape_and_no_mask() -> None:
    model, seen = qwen3_vl(), []
    use_dense_deepstack(model.get_decoder())
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: None)
    plain = model.get_decoder().forward
    model.get_decoder().forward = lambda *args, **kwargs: seen.append(kwargs) or plain(*args, **kwargs)
    with torch.no_grad():
        model(**batch_of_two())
    (inputs,) = seen
    assert inputs["visual_pos_masks"] is None
    assert [tuple(feature.shape) for feature in inputs["deepstack_visual_embeds"]] == [(2, 24, 64)] * 2


def test_rows_without_images_and_decoders_without_deepstack() -> None:
    model = qwen3_vl()
    use_dense_deepstack(model.get_decoder())
    text = {name: batch_of_two()[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"] % 250
    with torch.no_grad():
        assert torch.equal(model(**text).logits, qwen3_vl()(**text).logits)
    assert not use_dense_deepstack(qwen2_5_vl().get_decoder())
