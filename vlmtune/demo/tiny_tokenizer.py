"""Tokenizers of the tiny models, trained on the text of the sample files."""

from typing import Any

import tokenizers
import transformers as tf
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers

from vlmtune.demo.instructions import instruction_rows
from vlmtune.demo.mall import MESSAGES

VOCABULARY = 960  # learnt and special tokens; at 64 floats each they are half of a model's file


def sample_texts() -> list[str]:
    """All texts of the sample files and the words of prompts, on which tokenizers are trained."""
    dialogues = [MESSAGES.format(count=count) for count in range(10)]
    return [
        *dialogues,
        *("\n".join(row.values()) for row in instruction_rows()),
        "USER: ASSISTANT: User: Assistant: System: user assistant system",
    ]


def llava_tokenizer(texts: list[str]) -> tf.PreTrainedTokenizerFast:
    """A tokenizer with LLaVA-1.5's special tokens."""
    return byte_level_tokenizer(
        texts,
        ["<unk>", "<s>", "</s>"],
        ["<image>", "<pad>"],
        add_bos=True,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def byte_level_tokenizer(
    texts: list[str], first: list[str], last: list[str], *, add_bos: bool = False, **options: str
) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on `texts`.

    Args:
        first, last: the special tokens at the vocabulary's beginning and end, as the family has them.
        add_bos: put the BOS token before every text that is tokenized with special tokens.
        options: bos_token, eos_token, … of the transformers tokenizer.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(last),
            special_tokens=first,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in last])
    if add_bos:
        bos = options["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    others = [token for token in first + last if token not in options.values()]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        **options,
    )


def token_ids(tokenizer: tf.PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
