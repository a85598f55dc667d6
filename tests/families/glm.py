"""Zhipu's GLM-4.xV families: answers end where the next role begins, or with <|endoftext|>."""

from typing import Any

import transformers as tf

from families.common import GAIN, WIDTH, Built, family, text, tiny_tokenizer, with_ends
from families.templates import chat_template

SPECIAL = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>"),
    *("<|end_of_video|>", "<|image|>", "<|video|>"),
]
ORDINARY = ("<think>", "</think>", "/nothink")
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [2, 3, 3],
    "partial_rotary_factor": 1.0,
}
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "initializer_range": GAIN,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "image_size": 112,
}


def _glm(config: Any, model: Any, template: str, processor: Any = tf.Glm4vProcessor, **more: Any) -> Built:
    tokenizer = tiny_tokenizer(
        SPECIAL,
        ordinary=ORDINARY,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    ids = tokenizer.vocab
    ends = [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]]
    tokens = {"eos_token_id": ends, "pad_token_id": ids["<|endoftext|>"]}
    made = config(
        text_config={**text(**tokens, vocab_size=len(tokenizer)), "rope_parameters": ROPE, **more},
        vision_config=TOWER,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
    )
    pixels = {"shortest_edge": 28 * 28 * 2, "longest_edge": 112 * 112 * 2}
    return with_ends(model(made), **tokens), processor(
        tf.Glm4vImageProcessor(size=pixels),
        tokenizer,
        tf.Glm4vVideoProcessor(size=pixels),
        chat_template=template,
    )


@family("<|user|>")
def glm4v() -> Built:
    """GLM-4.1V."""
    return _glm(tf.Glm4vConfig, tf.Glm4vForConditionalGeneration, chat_template("glm4v"))


@family("<|user|>")
def glm4v_moe() -> Built:
    """GLM-4.5V: routed and shared experts after a first dense layer."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    more = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    return _glm(
        tf.Glm4vMoeConfig,
        tf.Glm4vMoeForConditionalGeneration,
        chat_template("glm45v"),
        head_dim=16,
        num_hidden_layers=3,
        **experts,
        **more,
    )


@family("<|user|>")
def glm46v() -> Built:
    """GLM-4.6V: the mixture of GLM-4.5V behind its own processor."""
    return _glm(
        tf.Glm46VConfig, tf.Glm46VForConditionalGeneration, chat_template("glm45v"), tf.Glm46VProcessor
    )
