"""Families with tensors of their own kind: token types by another name, grids, slices, window attention."""

from typing import Any

import transformers as tf

from families.common import TOWER, WIDTH, Built, family, text, tiny_tokenizer, token_ids, with_ends
from families.qwen import PATCH14, QwenParts
from families.templates import chatml

MARKS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
SLICES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


@family("<|im_end|>")
def ernie4_5_vl_moe() -> Built:
    """Token types of its experts by a name of their own, and experts of text and of images."""
    tokenizer = tiny_tokenizer([*ENDS, *MARKS.values()], named=MARKS, **ROLES)
    ids = {name: tokenizer.vocab[token] for name, token in MARKS.items()}
    config = tf.Ernie4_5_VLMoeConfig(
        text_config=text(
            **token_ids(tokenizer),
            vocab_size=len(tokenizer),
            moe_intermediate_size=[WIDTH, WIDTH],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]},
        ),
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "initializer_range": TOWER["initializer_range"],
        },
        **{f"{name}_id": number for name, number in ids.items()},
    )
    processor = tf.Ernie4_5_VLMoeProcessor(
        tf.Ernie4_5_VLMoeImageProcessor(size=PATCH14),
        tokenizer,
        tf.Ernie4_5_VLMoeVideoProcessor(size=PATCH14, draw_on_frames=False),
        chat_template=chatml(
            f"{MARKS['image_start_token']}{MARKS['image_token']}{MARKS['image_end_token']}", ""
        ),
    )
    return with_ends(tf.Ernie4_5_VLMoeForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family("<|im_end|>")
def exaone4_5() -> Built:
    """A tower with windows and grouped keys, over a decoder without norms before its blocks."""
    parts = QwenParts()
    config = tf.Exaone4_5_Config(
        text_config=parts.text(model_type="exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": TOWER["initializer_range"],
        },
        image_token_id=parts.images["image_token_id"],
        video_token_id=parts.images["video_token_id"],
    )
    processor = tf.Exaone4_5_Processor(
        tf.Qwen2VLImageProcessor(size=PATCH14),
        parts.tokenizer,
        tf.Qwen2VLVideoProcessor(size=PATCH14),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>", ""),
    )
    return with_ends(tf.Exaone4_5_ForConditionalGeneration(config), **parts.ends), processor


@family("<|im_end|>")
def hunyuan_vl() -> Built:
    """Image tokens for the ends of lines, and positions on several axes."""
    marks = {name: MARKS[name] for name in ("image_token", "image_start_token", "image_end_token")}
    tokenizer = tiny_tokenizer([*ENDS, *marks.values(), "<|newline|>"], named=marks, **ROLES)
    vision: dict[str, Any] = {
        **TOWER,
        "patch_size": 14,
        "out_hidden_size": WIDTH,
        "text_hidden_size": WIDTH,
        "img_max_token_num": 64,
        "max_image_size": 112,
        "min_image_size": 28,
    }
    config = tf.HunYuanVLConfig(
        text_config=text(
            **token_ids(tokenizer),
            vocab_size=len(tokenizer),
            head_dim=WIDTH // 4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
        ),
        vision_config=vision,
        image_token_id=tokenizer.vocab[marks["image_token"]],
        im_start_id=tokenizer.vocab[marks["image_start_token"]],
        im_end_id=tokenizer.vocab[marks["image_end_token"]],
        im_newline_id=tokenizer.vocab["<|newline|>"],
    )
    images = tf.HunYuanVLImageProcessor(size=PATCH14, patch_size=14)
    template = chatml(f"{marks['image_start_token']}{marks['image_token']}{marks['image_end_token']}", "")
    processor = tf.HunYuanVLProcessor(images, tokenizer, chat_template=template)
    return with_ends(tf.HunYuanVLForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family("<|im_end|>")
def minicpmv4_6() -> Built:
    """Slices of an image, packed along the last axis of its pixels."""
    tokenizer = tiny_tokenizer([*ENDS, *SLICES.values()], named=SLICES, **ROLES)
    config = tf.MiniCPMV4_6Config(
        text_config=text(
            **token_ids(tokenizer), vocab_size=len(tokenizer), model_type="qwen3", head_dim=WIDTH // 4
        ),
        vision_config={**TOWER, "image_size": 56, "patch_size": 14, "insert_layer_id": 0},
        insert_layer_id=0,
        image_size=56,
        image_token_id=tokenizer.vocab["<|image_pad|>"],
        video_token_id=tokenizer.vocab["<|video_pad|>"],
    )
    processor = tf.MiniCPMV4_6Processor(
        tf.MiniCPMV4_6ImageProcessor(scale_resolution=112, max_slice_nums=2, patch_size=14),
        tf.MiniCPMV4_6VideoProcessor(scale_resolution=112, max_slice_nums=1, patch_size=14),
        tokenizer,
        chat_template=chatml("<|image_pad|>", "<|video_pad|>"),
    )
    return with_ends(tf.MiniCPMV4_6ForConditionalGeneration(config), **token_ids(tokenizer)), processor
