"""Families that are no chat models: encoder-decoders, and captioners whose image stands before all text."""

from typing import Any

import transformers as tf

from families.common import (
    TOWER,
    WIDTH,
    Built,
    clip,
    family,
    square,
    text,
    tiny_tokenizer,
    token_ids,
    with_ends,
)


def _bart_tokenizer(**options: Any) -> tf.PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "<mask>"]
    return tiny_tokenizer(
        special,
        first=True,
        add_bos=True,
        add_eos=True,
        named={"image_token": "<image>"},
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **options,
    )


@family(None)
def florence2() -> Built:
    """An encoder-decoder."""
    tokenizer = _bart_tokenizer()
    tokens = token_ids(tokenizer)
    decoder = tf.BartConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=512,
        decoder_start_token_id=tokens["eos_token_id"],
        forced_eos_token_id=None,
        **tokens,
    )
    config = tf.Florence2Config(
        text_config=decoder.to_dict(),
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": [32, 32, 64, 64],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "window_size": 4,
            "projection_dim": WIDTH,
            "drop_path_rate": 0.0,
        },
        image_token_id=tokenizer.vocab["<image>"],
    )
    images = tf.CLIPImageProcessor(size=square(64), do_center_crop=False)
    images.image_seq_length = 5
    processor = tf.Florence2Processor(images, tokenizer)
    return with_ends(tf.Florence2ForConditionalGeneration(config), **tokens), processor


def _blip2(decoder: Any, tokenizer: Any) -> Built:
    tokens = token_ids(tokenizer)
    config = tf.Blip2Config(
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        qformer_config={
            "vocab_size": 32,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "encoder_hidden_size": WIDTH,
        },
        text_config=decoder.to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.vocab["<image>"],
    )
    processor = tf.Blip2Processor(tf.BlipImageProcessor(size=square()), tokenizer, num_query_tokens=4)
    return with_ends(tf.Blip2ForConditionalGeneration(config), **tokens), processor


@family(None)
def blip2_opt() -> Built:
    """A decoder that reads query tokens put before the text, whatever the text holds."""
    tokenizer = _bart_tokenizer()
    decoder = tf.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        **token_ids(tokenizer),
    )
    return _blip2(decoder, tokenizer)


@family(None)
def blip2_t5() -> Built:
    """An encoder-decoder."""
    tokenizer = _bart_tokenizer()
    decoder = tf.T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        **token_ids(tokenizer),
    )
    return _blip2(decoder, tokenizer)


@family(None)
def git() -> Built:
    """The whole image stands before the text; there is no image token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = tiny_tokenizer(
        special,
        first=True,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        add_bos=True,
        add_eos=True,
    )
    sizes = {name: value for name, value in text().items() if name != "num_key_value_heads"}
    config = tf.GitConfig(
        **sizes,
        vocab_size=len(tokenizer),
        vision_config={name: value for name, value in clip().items() if name != "model_type"},
        **token_ids(tokenizer),
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square())
    return with_ends(tf.GitForCausalLM(config), **token_ids(tokenizer)), tf.GitProcessor(images, tokenizer)


@family(None)
def kosmos2() -> Built:
    """Image positions are marked by a mask of the processor's, along the tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    more = [f"<latent_{n}>" for n in range(64)]
    tokenizer = tiny_tokenizer(
        [*special, *more],
        first=True,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos=True,
        add_eos=True,
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square())
    processor = tf.Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16)
    tokens = token_ids(tokenizer)
    config = tf.Kosmos2Config(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "embed_dim": WIDTH,
            "layers": 2,
            "ffn_dim": 128,
            "attention_heads": 4,
            "dropout": 0.0,
            **tokens,
        },
        vision_config={name: value for name, value in clip().items() if name != "model_type"},
        latent_query_num=64,
    )
    return with_ends(tf.Kosmos2ForConditionalGeneration(config), **tokens), processor
