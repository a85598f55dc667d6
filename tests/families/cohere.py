"""Cohere's families, whose decoder scales its logits, and DeepSeek's, which prepend a text of their own."""

from typing import Any

import transformers as tf

from families.common import (
    GAIN,
    SIDE,
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
from families.llava import llama_text
from families.templates import chat_template

SPECIAL = [
    *("<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    "<image>",
]
IMAGE = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
CROPS = {"size": square(), "crop_to_patches": True, "max_patches": 4, "min_patches": 1}


def _tokenizer(named: dict[str, str] | None = None) -> tf.PreTrainedTokenizerFast:
    return tiny_tokenizer(
        SPECIAL,
        add_bos=True,
        named=named,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        unk_token="<UNK>",
        padding_side="left",
    )


def _decoder(tokenizer: Any) -> dict[str, Any]:
    return tf.Cohere2Config(
        **text(**token_ids(tokenizer), vocab_size=len(tokenizer), num_hidden_layers=4),
        head_dim=16,
        sliding_window=16,
        logit_scale=0.25,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ).to_dict()


@family("<|END_RESPONSE|>")
def aya_vision() -> Built:
    tokenizer = _tokenizer()
    config = tf.AyaVisionConfig(
        text_config=_decoder(tokenizer),
        vision_config=siglip(),
        image_token_index=tokenizer.vocab["<|IMG_PATCH|>"],
        downsample_factor=2,
    )
    images = tf.GotOcr2ImageProcessor(**CROPS)
    processor = tf.AyaVisionProcessor(
        images,
        tokenizer,
        patch_size=14,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=chat_template("cohere", IMAGE="<image>"),
    )
    return with_ends(tf.AyaVisionForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family("<|END_RESPONSE|>")
def cohere2_vision() -> Built:
    """With several chat templates in a dict."""
    tokenizer = _tokenizer(IMAGE)
    config = tf.Cohere2VisionConfig(
        text_config=_decoder(tokenizer),
        vision_config=siglip(),
        image_token_id=tokenizer.vocab["<|IMG_PATCH|>"],
        downsample_factor=2,
        alignment_intermediate_size=128,
    )
    images = tf.Cohere2VisionImageProcessor(**CROPS, patch_size=2)
    processor = tf.Cohere2VisionProcessor(
        images,
        tokenizer,
        chat_template={
            "default": chat_template("cohere", IMAGE="<|IMG_PATCH|>"),
            "rag": "{{ documents[0] }}",
        },
    )
    return with_ends(tf.Cohere2VisionForConditionalGeneration(config), **token_ids(tokenizer)), processor


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK = [BOS, EOS, "<pad>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"]
DEEPSEEK_IMAGE = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}


def _deepseek_tokenizer() -> tf.PreTrainedTokenizerFast:
    return tiny_tokenizer(
        DEEPSEEK,
        add_bos=True,
        bos_token=BOS,
        eos_token=EOS,
        pad_token="<pad>",
        padding_side="left",
        named=DEEPSEEK_IMAGE,
    )


@family(EOS)
def deepseek_vl() -> Built:
    tokenizer = _deepseek_tokenizer()
    config = tf.DeepseekVLConfig(
        text_config=llama_text(tokenizer),
        vision_config=siglip(),
        image_token_id=tokenizer.vocab["<image_placeholder>"],
        tie_word_embeddings=False,
    )
    images = tf.DeepseekVLImageProcessor(size=square())
    processor = tf.DeepseekVLProcessor(
        images, tokenizer, chat_template=chat_template("deepseek_vl"), num_image_tokens=16
    )
    return with_ends(tf.DeepseekVLForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family(EOS)
def deepseek_vl_hybrid() -> Built:
    """A second tower of the SAM kind reads larger pixels, `high_res_pixel_values`."""
    tokenizer = _deepseek_tokenizer()
    config = tf.DeepseekVLHybridConfig(
        text_config=llama_text(tokenizer),
        vision_config=siglip(),
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": WIDTH,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 256,
            "patch_size": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
            "initializer_range": GAIN,
        },
        image_token_id=tokenizer.vocab["<image_placeholder>"],
        tie_word_embeddings=False,
    )
    images = tf.DeepseekVLHybridImageProcessor(size=square(), high_res_size=square(256))
    processor = tf.DeepseekVLHybridProcessor(
        images, tokenizer, chat_template=chat_template("deepseek_vl"), num_image_tokens=16
    )
    return with_ends(tf.DeepseekVLHybridForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family(EOS)
def janus() -> Built:
    tokenizer = _deepseek_tokenizer()
    config = tf.JanusConfig(
        text_config=llama_text(tokenizer),
        vision_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 14,
            "mlp_ratio": 2.0,
            "projection_dim": WIDTH,
            "num_image_tokens": 16,
            "depth": 2,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 64,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        image_token_id=tokenizer.vocab["<image_placeholder>"],
    )
    images = tf.JanusImageProcessor(size=square())
    processor = tf.JanusProcessor(
        images, tokenizer, chat_template=chat_template("deepseek_vl"), num_image_tokens=16
    )
    return with_ends(tf.JanusForConditionalGeneration(config), **token_ids(tokenizer)), processor
