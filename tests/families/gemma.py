"""Google's families: Gemma 3, 3n and 4, whose images are attended both ways, and PaliGemma, a prefix LM."""

from typing import Any

import torch
import transformers as tf

from families.common import (
    GAIN,
    SIDE,
    TOWER,
    WIDTH,
    Built,
    family,
    siglip,
    square,
    text,
    tiny_tokenizer,
    token_ids,
    with_ends,
)
from families.templates import chat_template

ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL3 = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]
IMAGE3 = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
SLIDING = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@family("<end_of_turn>")
def gemma3() -> Built:
    tokenizer = tiny_tokenizer(SPECIAL3, add_bos=True, padding_side="left", named=IMAGE3, **ROLES)
    ids, tokens = tokenizer.vocab, token_ids(tokenizer)
    decoder = text(**tokens, vocab_size=len(tokenizer), query_pre_attn_scalar=16, **SLIDING)
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**decoder).to_dict(),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        initializer_range=GAIN,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=GAIN)
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size=square()),
        tokenizer,
        chat_template=chat_template("gemma3", IMAGE="<start_of_image>"),
        image_seq_length=4,
    )
    return with_ends(model, **{**tokens, "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]]}), processor


@family("<end_of_turn>", needs="timm")
def gemma3n() -> Built:
    audio = {
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    tokenizer = tiny_tokenizer(
        [*SPECIAL3, *audio.values()], add_bos=True, padding_side="left", named={**IMAGE3, **audio}, **ROLES
    )
    ids, tokens, size = tokenizer.vocab, token_ids(tokenizer), len(tokenizer)
    decoder = tf.Gemma3nTextConfig(
        **text(**tokens, vocab_size=size, **SLIDING),
        vocab_size_per_layer_input=size - 8,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        laurel_rank=16,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    config = tf.Gemma3nConfig(
        text_config=decoder.to_dict(),
        vision_config={
            "architecture": "mobilenetv5_300m_enc",
            "hidden_size": 2048,
            "vocab_size": 8,
            "vocab_offset": size,
            "initializer_range": 0.02,
        },
        audio_config={
            "hidden_size": WIDTH,
            "vocab_size": 8,
            "vocab_offset": size + 8,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
            "input_feat_size": 32,
            "sscp_conv_channel_size": [16, 8],
        },
        vision_soft_tokens_per_image=256,
        audio_soft_tokens_per_image=4,
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
        image_token_id=ids["<image_soft_token>"],
        boa_token_id=ids["<start_of_audio>"],
        eoa_token_id=ids["<end_of_audio>"],
        audio_token_id=ids["<audio_soft_token>"],
    )
    processor = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(),
        tf.SiglipImageProcessor(size=square(256), do_normalize=False),
        tokenizer,
        chat_template=chat_template("gemma3", IMAGE="<image_soft_token>"),
        image_seq_length=256,
        audio_seq_length=4,
    )
    ends = {**tokens, "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]]}
    return with_ends(tf.Gemma3nForConditionalGeneration(config), **ends), processor


SPECIAL4 = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"),
]
NAMED4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}


def _gemma4(*, per_layer: int, shared: int, **more: Any) -> Built:
    tokenizer = tiny_tokenizer(SPECIAL4, add_bos=True, padding_side="left", named=NAMED4, **ROLES)
    ids, tokens, size = tokenizer.vocab, token_ids(tokenizer), len(tokenizer)
    decoder = tf.Gemma4TextConfig(
        **text(**tokens, vocab_size=size, **SLIDING),
        vocab_size_per_layer_input=size,
        hidden_size_per_layer_input=per_layer,
        num_kv_shared_layers=shared,
        final_logit_softcapping=30.0,
        use_bidirectional_attention="vision",
        **more,
    )
    config = tf.Gemma4Config(
        text_config=decoder.to_dict(),
        vision_config={
            **TOWER,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "pooling_kernel_size": 3,
            "patch_size": 16,
            "position_embedding_size": 64,
        },
        audio_config=None,
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
        initializer_range=GAIN,
    )
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        tf.Gemma4VideoProcessor(max_soft_tokens=70),
        chat_template=chat_template("gemma4"),
        image_seq_length=70,
    )
    ends = {**tokens, "eos_token_id": [ids["<eos>"], ids["<turn|>"]]}
    return with_ends(tf.Gemma4ForConditionalGeneration(config), **ends), processor


@family("<turn|>")
def gemma4() -> Built:
    return _gemma4(per_layer=16, shared=2)


@family("<turn|>")
def gemma4_moe() -> Built:
    return _gemma4(
        per_layer=0,
        shared=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
    )


def _paligemma(decoder: Any, **more: Any) -> Built:
    tokenizer = tiny_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
        add_bos=True,
        named={"image_token": "<image>"},
        **ROLES,
    )
    images = tf.SiglipImageProcessor(size=square())
    images.image_seq_length = 16
    tokens, size = token_ids(tokenizer), len(tokenizer)
    config = tf.PaliGemmaConfig(
        text_config=decoder(**text(**tokens, vocab_size=size, head_dim=16, **more)).to_dict(),
        vision_config=siglip(image_size=SIDE, projection_dim=WIDTH, num_image_tokens=16, vocab_size=size),
        image_token_index=tokenizer.vocab["<image>"],
        vocab_size=size,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return with_ends(tf.PaliGemmaForConditionalGeneration(config), **tokens), tf.PaliGemmaProcessor(
        images, tokenizer
    )


@family(None)
def paligemma() -> Built:
    return _paligemma(tf.GemmaConfig)


@family(None)
def paligemma2() -> Built:
    return _paligemma(tf.Gemma2Config, query_pre_attn_scalar=16, sliding_window=16)
