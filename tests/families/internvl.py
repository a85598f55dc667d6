"""InternVL, Ovis2 and LFM2-VL: towers that read an image in crops."""

import transformers as tf

from families.common import (
    SIDE,
    TOWER,
    WIDTH,
    Built,
    family,
    square,
    text,
    tiny_tokenizer,
    token_ids,
    with_ends,
)
from families.templates import chat_template, chatml

CROPS = {"size": square(), "crop_to_patches": True, "max_patches": 4, "min_patches": 1}


@family("<|im_end|>")
def internvl() -> Built:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = tiny_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>", named=named)
    ids = tokenizer.vocab
    tokens = {**token_ids(tokenizer), "bos_token_id": ids["<|endoftext|>"]}
    config = tf.InternVLConfig(
        text_config=tf.Qwen3Config(**text(**tokens, vocab_size=len(tokenizer), head_dim=16)).to_dict(),
        vision_config={**TOWER, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(**CROPS),
        tokenizer,
        tf.InternVLVideoProcessor(size=square()),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\\n", "<video>\\n"),
    )
    return with_ends(tf.InternVLForConditionalGeneration(config), **tokens), processor


@family("<|im_end|>")
def ovis2() -> Built:
    """A visual vocabulary, and indicator tokens around crops; the processor needs `return_tensors`."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_ATOM>", *marks, "<image>"]
    tokenizer = tiny_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.vocab
    tokens = {**token_ids(tokenizer), "bos_token_id": ids["<|endoftext|>"]}
    config = tf.Ovis2Config(
        text_config=tf.Qwen2Config(**text(**tokens, vocab_size=len(tokenizer))).to_dict(),
        vision_config={**TOWER, "image_size": SIDE, "patch_size": 14, "hidden_stride": 2, "vocab_size": 64},
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[mark] for mark in marks],
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )
    images = tf.Ovis2ImageProcessor(size=square(), crop_to_patches=True, max_patches=3)
    processor = tf.Ovis2Processor(
        images, tokenizer, chat_template=chatml("<image>\\n", default_system=True), image_seq_length=4
    )
    return with_ends(tf.Ovis2ForConditionalGeneration(config), **tokens), processor


@family("<|im_end|>")
def lfm2_vl() -> Built:
    """Convolutions between attention layers, whose output is `out_proj`; padded patches with a mask."""
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    grid = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tiny_tokenizer(
        [*special, *named.values(), *grid],
        add_bos=True,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        named=named,
    )
    tokens = token_ids(tokenizer)
    decoder = tf.Lfm2Config(
        **text(**tokens, vocab_size=len(tokenizer), num_hidden_layers=4),
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
    )
    config = tf.Lfm2VlConfig(
        text_config=decoder.to_dict(),
        vision_config={
            **TOWER,
            "model_type": "siglip2_vision_model",
            "num_patches": 16,
            "patch_size": 16,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.vocab["<image>"],
        projector_hidden_size=WIDTH,
        downsample_factor=2,
    )
    images = tf.Lfm2VlImageProcessor(
        tile_size=64,
        max_image_tokens=4,
        min_image_tokens=1,
        max_num_patches=16,
        encoder_patch_size=16,
        downsample_factor=2,
        min_tiles=2,
        max_tiles=4,
        use_thumbnail=True,
    )
    processor = tf.Lfm2VlProcessor(images, tokenizer, chat_template=chat_template("lfm2_vl"))
    return with_ends(tf.Lfm2VlForConditionalGeneration(config), **tokens), processor
