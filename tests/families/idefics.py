"""Idefics and SmolVLM: batches hold a block of images for each row."""

from typing import Any

import transformers as tf

from families.common import SIDE, TOWER, WIDTH, Built, family, tiny_tokenizer, token_ids, with_ends
from families.llava import ROLES, llama_text, mistral_text
from families.templates import chat_template

GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@family("<end_of_utterance>")
def idefics2() -> Built:
    """A perceiver makes a fixed number of features an image; the processor tells no replacement offsets."""
    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<pad>"]
    tokenizer = tiny_tokenizer(
        special, first=True, add_bos=True, pad_token="<pad>", padding_side="left", **ROLES
    )
    tokens, ids = token_ids(tokenizer), tokenizer.vocab
    config = tf.Idefics2Config(
        text_config=mistral_text(tokenizer),
        vision_config={**TOWER, "image_size": SIDE, "patch_size": 14},
        perceiver_config={
            "hidden_size": WIDTH,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=ids["<image>"],
    )
    images = tf.Idefics2ImageProcessor(
        size={"longest_edge": SIDE, "shortest_edge": 28}, do_image_splitting=False
    )
    processor = tf.Idefics2Processor(
        images, tokenizer, image_seq_len=4, chat_template=chat_template("idefics", HEAD="")
    )
    ends = {**tokens, "eos_token_id": [ids["</s>"], ids["<end_of_utterance>"]]}
    return with_ends(tf.Idefics2ForConditionalGeneration(config), **ends), processor


def _smolvlm_tokenizer(*more: str, named: dict[str, str] | None = None) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", *GRID]
    return tiny_tokenizer(
        [*special, "<fake_token_around_image>", "<image>", *more, "<end_of_utterance>"],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        named=named,
    )


@family("<end_of_utterance>")
def idefics3() -> Built:
    """Idefics3 and SmolVLM: tiles of an image and the image as a whole, four tokens each."""
    tokenizer = _smolvlm_tokenizer()
    config = tf.Idefics3Config(
        text_config=llama_text(tokenizer),
        vision_config={**TOWER, "model_type": "idefics3_vision", "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
    )
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = tf.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=chat_template("idefics", HEAD="<|im_start|>")
    )
    return with_ends(tf.Idefics3ForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family("<end_of_utterance>")
def smolvlm2() -> Built:
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
    }
    tokenizer = _smolvlm_tokenizer("<video>", named=named)
    config = tf.SmolVLMConfig(
        text_config=llama_text(tokenizer),
        vision_config={**TOWER, "model_type": "smolvlm_vision", "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
    )
    tile = {"max_image_size": {"longest_edge": 32}}
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(size={"longest_edge": 64}, **tile),
        tokenizer,
        tf.SmolVLMVideoProcessor(size={"longest_edge": 32}, **tile),
        image_seq_len=4,
        chat_template=chat_template("idefics", HEAD="<|im_start|>"),
    )
    return with_ends(tf.SmolVLMForConditionalGeneration(config), **token_ids(tokenizer)), processor
