"""Meta's families: Llama 3.2 Vision (cross-attention), Llama 4 (experts, tiles) and Perception LM."""

import torch
import transformers as tf

from families.common import (
    GAIN,
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
from families.llava import llama_text
from families.templates import chat_template

LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
]


def _mllama(template: str) -> Built:
    tokenizer = tiny_tokenizer(
        [*LLAMA3_SPECIAL, "<|image|>"],
        add_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    ids, image = tokenizer.vocab, tokenizer.vocab["<|image|>"]  # the image token has no row of the head
    tokens = {
        **token_ids(tokenizer),
        "eos_token_id": [ids[t] for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
    }
    config = tf.MllamaConfig(
        text_config=tf.MllamaTextConfig(
            **text(num_hidden_layers=4, vocab_size=image, **tokens), cross_attention_layers=[1, 3]
        ),
        vision_config=tf.MllamaVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            initializer_range=GAIN,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=28,
            patch_size=14,
            max_num_tiles=4,
            intermediate_layers_indices=[0, 1],
            vision_output_dim=3 * WIDTH,
        ),
        image_token_index=image,
    )
    model = tf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name.rsplit(".", 1)[-1]:  # they start shut: no image would reach the text
            torch.nn.init.constant_(parameter, 0.5)
    images = tf.MllamaImageProcessor(size=square(28), max_image_tiles=4)
    return with_ends(model, **tokens), tf.MllamaProcessor(images, tokenizer, chat_template=template)


@family("<|eot_id|>")
def mllama() -> Built:
    return _mllama(
        chat_template("llama", OPEN="<|start_header_id|>", SHUT="<|end_header_id|>", END="<|eot_id|>")
    )


@family("<|eot_id|>")
def mllama_dated() -> Built:
    """Its template writes today's date, and takes a system turn as a string, without an image, only."""
    return _mllama(chat_template("llama3_dated"))


@family("<|eot|>")
def llama4() -> Built:
    special = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>", "<|header_start|>"),
        *("<|header_end|>", "<|eom|>", "<|eot|>", "<|image_start|>", "<|image_end|>", "<|image|>"),
        *("<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    ]
    tokenizer = tiny_tokenizer(
        special,
        add_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
    )
    ids, tokens = tokenizer.vocab, token_ids(tokenizer)
    decoder = tf.Llama4TextConfig(
        **text(**tokens, vocab_size=len(tokenizer), num_hidden_layers=4),
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        attention_chunk_size=64,
        no_rope_layers=[1, 0, 1, 0],
    )
    config = tf.Llama4Config(
        text_config=decoder.to_dict(),
        vision_config={
            **TOWER,
            "image_size": SIDE,
            "patch_size": 14,
            "vision_output_dim": WIDTH,
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
            "intermediate_size": 4 * WIDTH,
        },
        boi_token_index=ids["<|image_start|>"],
        eoi_token_index=ids["<|image_end|>"],
        image_token_index=ids["<|patch|>"],
    )
    images = tf.Llama4ImageProcessor(size=square(), max_patches=4)
    processor = tf.Llama4Processor(
        images,
        tokenizer,
        patch_size=14,
        chat_template=chat_template("llama", OPEN="<|header_start|>", SHUT="<|header_end|>", END="<|eot|>"),
    )
    ends = {**tokens, "eos_token_id": [ids[token] for token in ("<|end_of_text|>", "<|eom|>", "<|eot|>")]}
    return with_ends(tf.Llama4ForConditionalGeneration(config), **ends), processor


@family("<|eot_id|>", needs="timm")
def perception_lm() -> Built:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|video|>"]
    tokenizer = tiny_tokenizer(
        [*special, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        add_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
    )
    ids = tokenizer.vocab
    tower = {
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 4,
        "img_size": [64, 64],
        "patch_size": 16,
        "global_pool": "",
        "use_post_transformer_norm": False,
    }
    config = tf.PerceptionLMConfig(
        text_config=llama_text(tokenizer),
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "do_pooling": False,
            "num_classes": 0,
            "global_pool": "",
            "model_args": tower,
        },
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
    )
    processor = tf.PerceptionLMProcessor(
        tf.PerceptionLMVideoProcessor(size=square(64)),
        tf.PerceptionLMImageProcessor(tile_size=64, max_num_tiles=4, size=square(64)),
        tokenizer,
        patch_size=16,
        chat_template=chat_template(
            "llama", OPEN="<|start_header_id|>", SHUT="<|end_header_id|>", END="<|eot_id|>"
        ),
        pooling_ratio=2,
    )
    return with_ends(tf.PerceptionLMForConditionalGeneration(config), **token_ids(tokenizer)), processor
