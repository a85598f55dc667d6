"""Mistral's families: images of any shape, with a token at the end of each row of patches."""

from typing import Any

import transformers as tf

from families.common import Built, family, tiny_tokenizer, token_ids, with_ends
from families.llava import PIXTRAL_TOWER, ROLES, mistral_text
from families.templates import chat_template

SPECIAL = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
]


def mistral_tokenizer() -> tf.PreTrainedTokenizerFast:
    return tiny_tokenizer(SPECIAL, first=True, add_bos=True, pad_token="<pad>", padding_side="left", **ROLES)


@family("</s>")
def mistral3() -> Built:
    tokenizer = mistral_tokenizer()
    config = tf.Mistral3Config(
        text_config=mistral_text(tokenizer),
        vision_config=PIXTRAL_TOWER,
        image_token_index=tokenizer.vocab["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = tf.PixtralProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chat_template("mistral"),
    )
    return with_ends(tf.Mistral3ForConditionalGeneration(config), **token_ids(tokenizer)), processor


def _pixtral(template: str) -> Built:
    tokenizer = mistral_tokenizer()
    config = tf.LlavaConfig(
        text_config=mistral_text(tokenizer),
        vision_config=PIXTRAL_TOWER,
        image_token_index=tokenizer.vocab["[IMG]"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=1,
    )
    images: Any = tf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    processor = tf.PixtralProcessor(images, tokenizer, patch_size=14, chat_template=template)
    return with_ends(tf.LlavaForConditionalGeneration(config), **token_ids(tokenizer)), processor


@family("</s>")
def pixtral() -> Built:
    return _pixtral(chat_template("mistral"))


@family("</s>")
def pixtral_strings() -> Built:
    """With a template that takes the answers as strings only."""
    return _pixtral(chat_template("pixtral_strings"))
