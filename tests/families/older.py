"""Older families: images as tokens (Chameleon, Emu3), patches as embeddings (Fuyu)."""

import transformers as tf

from families.common import (
    GAIN,
    WIDTH,
    Built,
    family,
    square,
    text,
    tiny_tokenizer,
    token_ids,
    with_ends,
)
from families.llava import ROLES
from families.templates import chat_template, chatml

CODES = 64  # of the image vocabulary


@family("</s>")
def chameleon() -> Built:
    """Image codes are tokens whose logits are masked; the processor appends a token to each text."""
    codes = [f"IMGIMG{'ABCDEFGHIJ'[n // 10]}{'ABCDEFGHIJ'[n % 10]}Z" for n in range(CODES)]
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<image>",
        "<racm3:break>",
        "<eoss>",
        "<reserved08706>",
        *codes,
    ]
    tokenizer = tiny_tokenizer(
        special,
        first=True,
        add_bos=True,
        pad_token="<pad>",
        sep_token="<reserved08706>",
        padding_side="left",
        named={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        **ROLES,
    )
    tokens, vocabulary = token_ids(tokenizer), tokenizer.get_vocab()
    config = tf.ChameleonConfig(
        **text(**tokens, vocab_size=len(tokenizer)),
        vq_config={
            "embed_dim": 16,
            "num_embeddings": CODES,
            "latent_channels": 16,
            "resolution": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={token: vocabulary[token] for token in special},
    )
    images = tf.ChameleonImageProcessor(size={"shortest_edge": 64}, crop_size=square(64))
    processor = tf.ChameleonProcessor(images, tokenizer, image_seq_length=16)
    return with_ends(tf.ChameleonForConditionalGeneration(config), **tokens), processor


@family("<|extra_204|>")
def emu3() -> Built:
    """Image codes are tokens of the vocabulary; the processor puts a BOS ahead of the text."""
    codes = [f"<|visual token {n:06d}|>" for n in range(CODES)]
    named = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    special = ["<|extra_203|>", "<|extra_204|>", "<|endoftext|>", *named.values(), "<|extra_200|>", *codes]
    tokenizer = tiny_tokenizer(
        special,
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        named=named,
    )
    tokens, vocabulary = token_ids(tokenizer), tokenizer.get_vocab()
    config = tf.Emu3Config(
        text_config=text(**tokens, vocab_size=len(tokenizer), attention_dropout=0.0),
        vq_config={
            "codebook_size": CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map={token: vocabulary[token] for token in [*special, "<image>"]},
    )
    images = tf.Emu3ImageProcessor(min_pixels=64 * 64, max_pixels=96 * 96)
    processor = tf.Emu3Processor(images, tokenizer, chat_template=chat_template("emu3"))
    return with_ends(tf.Emu3ForConditionalGeneration(config), **tokens), processor


@family(None, systems=False)
def fuyu() -> Built:
    """Patches of the image are embedded without a tower (`image_patches`)."""
    special = ["<unk>", "<s>", "</s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    tokenizer = tiny_tokenizer(
        special, first=True, unk_token="<unk>", bos_token="<s>", eos_token="|ENDOFTEXT|", pad_token="<unk>"
    )
    tokens = token_ids(tokenizer)
    decoder = tf.PersimmonConfig(
        **{name: value for name, value in text(**tokens).items() if name != "num_key_value_heads"},
        vocab_size=len(tokenizer),
    )
    config = tf.FuyuConfig(
        text_config=decoder.to_dict(),
        image_size=120,
        patch_size=30,
        image_token_id=tokenizer.vocab["|SPEAKER|"],
    )
    images = tf.FuyuImageProcessor(size=square(120), patch_size=square(30))
    return with_ends(tf.FuyuForCausalLM(config), **tokens), tf.FuyuProcessor(images, tokenizer)


@family("<|im_end|>")
def got_ocr2() -> Built:
    """Its processor needs an image in each row."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    tokenizer = tiny_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokens = token_ids(tokenizer)
    config = tf.GotOcr2Config(
        text_config=tf.Qwen2Config(**text(**tokens, vocab_size=len(tokenizer))).to_dict(),
        vision_config={
            "hidden_size": WIDTH,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 1024,
            "patch_size": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
            "initializer_range": GAIN,
        },
        image_token_index=tokenizer.vocab["<imgpad>"],
        image_seq_length=256,
    )
    images = tf.GotOcr2ImageProcessor(size=square(1024))
    processor = tf.GotOcr2Processor(images, tokenizer, chat_template=chatml("<img><imgpad></img>\\n"))
    return with_ends(tf.GotOcr2ForConditionalGeneration(config), **tokens), processor
