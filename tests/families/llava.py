"""LLaVA and its descendants: a CLIP or SigLIP tower, a projector, one token of the text for each feature."""

from typing import Any

import transformers as tf

from families.common import (
    WIDTH,
    Built,
    clip,
    family,
    siglip,
    square,
    text,
    tiny_tokenizer,
    token_ids,
    with_ends,
)
from families.templates import chat_template

ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def llama_tokenizer(*more: str, **options: Any) -> tf.PreTrainedTokenizerFast:
    """Special tokens as Llama 1 and 2 have them."""
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *more]
    return tiny_tokenizer(
        special, first=True, add_bos=True, pad_token="<pad>", padding_side="left", **ROLES, **options
    )


def mistral_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    config = tf.MistralConfig(
        **text(vocab_size=len(tokenizer), **token_ids(tokenizer)), head_dim=16, sliding_window=None, **more
    )
    return config.to_dict()


def llama_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    config = tf.LlamaConfig(
        **text(vocab_size=len(tokenizer), **token_ids(tokenizer)), rms_norm_eps=1e-5, **more
    )
    return config.to_dict()


@family("</s>")
def llava() -> Built:
    """LLaVA-1.5: no chat template at all."""
    tokenizer = llama_tokenizer()
    tokens = token_ids(tokenizer)
    config = tf.LlavaConfig(
        text_config=llama_text(tokenizer),
        vision_config=clip(),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=16,
        **tokens,
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square()),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return with_ends(tf.LlavaForConditionalGeneration(config), **tokens), processor


def _next_processor(tokenizer: Any, template: str, *, strategy: str, extra: int) -> Any:
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=square(), image_grid_pinpoints=PINPOINTS
    )
    return tf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=template,
    )


@family("</s>")
def llava_next() -> Built:
    """LLaVA-NeXT on Mistral: several crops an image, no generation prompt."""
    tokenizer = llama_tokenizer()
    tokens = token_ids(tokenizer)
    config = tf.LlavaNextConfig(
        text_config=mistral_text(tokenizer),
        vision_config=clip(),
        image_token_index=tokenizer.vocab["<image>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **tokens,
    )
    processor = _next_processor(tokenizer, chat_template("llava_next_mistral"), strategy="default", extra=1)
    return with_ends(tf.LlavaNextForConditionalGeneration(config), **tokens), processor


@family("</s>")
def granite_vision() -> Built:
    """Granite Vision: LLaVA-NeXT whose projector reads several layers of a SigLIP tower."""
    tokenizer = llama_tokenizer()
    tokens = token_ids(tokenizer)
    decoder = tf.GraniteConfig(
        **text(vocab_size=len(tokenizer), **tokens), logits_scaling=2.0, residual_multiplier=0.5
    )
    config = tf.LlavaNextConfig(
        text_config=decoder.to_dict(),
        vision_config=siglip(num_hidden_layers=4),
        image_token_index=tokenizer.vocab["<image>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_layer=[-3, -1],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=True,
        **tokens,
    )
    processor = _next_processor(tokenizer, chat_template("llava_vicuna"), strategy="full", extra=0)
    return with_ends(tf.LlavaNextForConditionalGeneration(config), **tokens), processor


@family("<|im_end|>")
def llava_onevision() -> Built:
    """One image of a row is read in crops, several are read whole."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = tiny_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.vocab
    tokens = {**token_ids(tokenizer), "bos_token_id": ids["<|endoftext|>"]}
    pinpoints = [[56, 56], *PINPOINTS]
    config = tf.LlavaOnevisionConfig(
        text_config=tf.Qwen2Config(**text(**tokens, vocab_size=len(tokenizer))).to_dict(),
        vision_config=siglip(),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
    )
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=square(), image_grid_pinpoints=pinpoints),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=square()),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template("llava_onevision"),
    )
    return with_ends(tf.LlavaOnevisionForConditionalGeneration(config), **tokens), processor


@family("</s>")
def vipllava() -> Built:
    tokenizer = llama_tokenizer()
    tokens = token_ids(tokenizer)
    config = tf.VipLlavaConfig(
        text_config=llama_text(tokenizer),
        vision_config=clip(),
        image_token_index=tokenizer.vocab["<image>"],
        vision_feature_layers=[-3, -2, -1],
        image_seq_length=16,
        **tokens,
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square()),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava_vicuna"),
    )
    return with_ends(tf.VipLlavaForConditionalGeneration(config), **tokens), processor


@family("</s>")
def video_llava() -> Built:
    """Video-LLaVA: its images go to the model as `pixel_values_images`."""
    tokenizer = llama_tokenizer("<video>")
    tokens = token_ids(tokenizer)
    config = tf.VideoLlavaConfig(
        text_config=llama_text(tokenizer),
        vision_config=clip(),
        image_token_index=tokenizer.vocab["<image>"],
        video_token_index=tokenizer.vocab["<video>"],
        image_seq_length=16,
        video_seq_length=17,
        **tokens,
    )
    size = {"size": {"shortest_edge": 56}, "crop_size": square()}
    processor = tf.VideoLlavaProcessor(
        tf.VideoLlavaImageProcessor(**size),
        tf.VideoLlavaVideoProcessor(**size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava_vicuna"),
    )
    return with_ends(tf.VideoLlavaForConditionalGeneration(config), **tokens), processor


@family("</s>")
def llava_next_video() -> Built:
    tokenizer = llama_tokenizer("<video>")
    tokens = token_ids(tokenizer)
    config = tf.LlavaNextVideoConfig(
        text_config=llama_text(tokenizer),
        vision_config=clip(),
        image_token_index=tokenizer.vocab["<image>"],
        video_token_index=tokenizer.vocab["<video>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **tokens,
    )
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=square(), image_grid_pinpoints=PINPOINTS
    )
    processor = tf.LlavaNextVideoProcessor(
        video_processor=tf.LlavaNextVideoVideoProcessor(size={"shortest_edge": 56}, crop_size=square()),
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava_vicuna"),
    )
    return with_ends(tf.LlavaNextVideoForConditionalGeneration(config), **tokens), processor


PIXTRAL_TOWER: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "initializer_range": WIDTH**-0.5,
}
