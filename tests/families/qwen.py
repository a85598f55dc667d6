"""Qwen's families: flattened patches, multimodal rope, one grid of patches an image."""

from typing import Any

import transformers as tf

from families.common import TOWER, WIDTH, Built, family, text, tiny_tokenizer, with_ends
from families.templates import chat_template, chatml

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # half of a head's 16
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
VISION_MARKS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
THOUGHT = ("<think>", "</think>")
PATCH14 = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
PATCH16 = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
VISION3 = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "initializer_range": TOWER["initializer_range"],
    "depth": 3,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 64,
    "patch_size": 16,
}


class QwenParts:
    """The tokenizer of a Qwen family and the ids that its config needs."""

    def __init__(self, ordinary: tuple[str, ...] = ()) -> None:
        self.tokenizer = tiny_tokenizer(
            SPECIAL, ordinary=ordinary, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        ids = self.tokenizer.vocab
        self.tokens = {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        }
        self.ends = {**self.tokens, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
        self.images = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }

    def text(self, **more: Any) -> dict[str, Any]:
        return text(**self.tokens, vocab_size=len(self.tokenizer), **more)


def _second(config: Any, model: Any, processor: Any, vision: dict[str, Any]) -> Built:
    parts = QwenParts()
    made = config(text_config=parts.text(rope_parameters=MROPE), vision_config=vision, **parts.images)
    images, video = tf.Qwen2VLImageProcessor(size=PATCH14), tf.Qwen2VLVideoProcessor(size=PATCH14)
    return with_ends(model(made), **parts.ends), processor(
        images, parts.tokenizer, video, chat_template=chatml(*VISION_MARKS, default_system=True)
    )


@family("<|im_end|>")
def qwen2_vl() -> Built:
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2}
    vision["initializer_range"] = TOWER["initializer_range"]
    return _second(tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor, vision)


@family("<|im_end|>")
def qwen2_5_vl() -> Built:
    vision = {**VISION3, "depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    del vision["num_position_embeddings"]
    return _second(tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLProcessor, vision)


def _third(
    config: Any, model: Any, template: str, ordinary: tuple[str, ...], vision: dict[str, Any], **more: Any
) -> Built:
    parts = QwenParts(ordinary)
    made = config(text_config=parts.text(**more), vision_config=vision, **parts.images)
    images = tf.Qwen2VLImageProcessor(size=PATCH16, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    video = tf.Qwen3VLVideoProcessor(size=PATCH16, patch_size=16)
    processor = tf.Qwen3VLProcessor(images, parts.tokenizer, video, chat_template=template)
    return with_ends(model(made), **parts.ends), processor


DEEP = {**VISION3, "deepstack_visual_indexes": [0, 1]}
DENSE3 = {"head_dim": 16, "num_hidden_layers": 3, "rope_parameters": INTERLEAVED}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@family("<|im_end|>")
def qwen3_vl() -> Built:
    return _third(
        tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, chatml(*VISION_MARKS), (), DEEP, **DENSE3
    )


@family("<|im_end|>")
def qwen3_vl_moe() -> Built:
    more = {**DENSE3, **EXPERTS, "decoder_sparse_step": 1, "tie_word_embeddings": False}
    return _third(
        tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeForConditionalGeneration, chatml(*VISION_MARKS), (), DEEP, **more
    )


RECURRENT = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0},
}


@family("<|im_end|>")
def qwen3_5() -> Built:
    return _third(
        tf.Qwen3_5Config,
        tf.Qwen3_5ForConditionalGeneration,
        chat_template("qwen3_5"),
        THOUGHT,
        VISION3,
        **RECURRENT,
    )


@family("<|im_end|>")
def qwen3_5_moe() -> Built:
    more = {**RECURRENT, **EXPERTS, "shared_expert_intermediate_size": 64}
    return _third(
        tf.Qwen3_5MoeConfig,
        tf.Qwen3_5MoeForConditionalGeneration,
        chat_template("qwen3_5"),
        THOUGHT,
        VISION3,
        **more,
    )
