from typing import Any

import pytest
import torch
from model.tiny_qwen import batch_of_two, qwen2_5_vl, qwen3_vl

from vlmtune.compat.transformers import attention_implementation
from vlmtune.model.vision_attention import NAME, attend_in_chunks, use_varlen_attention


@pytest.mark.parametrize("build", [qwen2_5_vl, qwen3_vl])
def test_one_call_for_all_chunks_computes_the_same(build: object) -> None:
    model = build()  # type: ignore[operator]
    with torch.no_grad():
        expected = model(**batch_of_two()).logits
        assert use_varlen_attention(model)
        found = model(**batch_of_two()).logits
    assert attention_implementation(model.config.vision_config) == NAME
    assert attention_implementation(model.config.text_config) == "sdpa"
    torch.testing.assert_close(found, expected)


def test_a_tower_without_chunks_or_with_a_chosen_kernel_stays_as_it_is() -> None:
    import transformers as tf

    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    text = tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    llava = tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text))
    assert not use_varlen_attention(llava)
    chosen = qwen3_vl()
    chosen.set_attn_implementation("eager")
    assert not use_varlen_attention(chosen)
    assert attention_implementation(chosen.config.vision_config) == "eager"


def test_chunks_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 8, generator=generator)
    bounds = torch.tensor([0, 3, 7])
    found, _ = attend_in_chunks(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=4
    )
    for first, last in ((0, 3), (3, 7)):
        weights = (query[..., first:last, :] @ key[..., first:last, :].transpose(-1, -2) * 0.3).softmax(-1)
        expected = (weights @ value[..., first:last, :]).transpose(1, 2)
        torch.testing.assert_close(found[:, first:last], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
def test_the_kernel_of_a_gpu_computes_the_same() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (3, 1, 16, 1200, 72)
    query, key, value = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, 500, 1200], device="cuda")
    arguments: Any = {"scaling": 0.2, "cu_seq_lens_q": bounds, "max_length_q": 700}
    layer = torch.nn.Identity()
    found, _ = attend_in_chunks(layer, query, key, value, None, **arguments)
    wide = (part.double() for part in (query, key, value))
    exact, _ = attend_in_chunks(layer, *wide, None, **arguments)
    assert (found - exact).norm() / exact.norm() < 1e-2
