"""What the builders of tiny families share: a register, a tokenizer, sizes of towers and decoders.

Every builder returns a model with random weights (seeded by `build`) and the family's real processor. Widths
are multiples of 64, the block of NF4. A weight's standard deviation is `GAIN`, so that random layers keep the
size of what passes through them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as tf
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers

WIDTH = 64
GAIN = WIDTH**-0.5
VOCABULARY = 640
MAX_LENGTH = 4096
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": GAIN,
    "max_position_embeddings": MAX_LENGTH,
}
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": GAIN,
}
SIDE = 56  # pixels of a square image that a tower of fixed size takes: 16 patches of 14 x 14
# Words of the tests' rows, and enough others for a vocabulary that splits words into few tokens.
CORPUS = [
    "how many people are in this image? what is the colour of the left door and of the bag on the floor",
    "many people are in this queue; three persons stand near the entrance, two walk away, one sits alone",
    "answer with a number. The shop window is bright, the lamp is dark. Nobody waits. Assistant: system",
    "compare the first picture with the second: fewer visitors, more light, 0 1 2 3 4 5 6 7 8 9 10 12 24 48",
]

Built = tuple[tf.PreTrainedModel, tf.ProcessorMixin]


@dataclass(frozen=True)
class Family:
    """One tiny family.

    Attributes:
        end: the token that must close each answer; None where the family's rows are to be refused.
        build: makes the model and its processor.
        systems: whether its chat template takes a system turn.
        needs: a package that its image tower needs beside torchvision (timm).
    """

    name: str
    end: str | None
    build: Callable[[], Built]
    systems: bool = True
    needs: str | None = None


FAMILIES: dict[str, Family] = {}


def family(
    end: str | None, *, systems: bool = True, needs: str | None = None
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder under its function's name."""

    def add(build: Callable[[], Built]) -> Callable[[], Built]:
        FAMILIES[build.__name__] = Family(build.__name__, end, build, systems, needs)
        return build

    return add


def build(name: str, folder: Path, *, seed: int = 0) -> int:
    """Write a family's tiny model and its processor to `folder`; returns its number of parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = FAMILIES[name].build()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_tokenizer(
    special: Sequence[str],
    *,
    first: bool = False,
    add_bos: bool = False,
    add_eos: bool = False,
    named: dict[str, str] | None = None,
    ordinary: Sequence[str] = (),
    kind: type[tf.PreTrainedTokenizerFast] = tf.PreTrainedTokenizerFast,
    **roles: str,
) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer.

    Args:
        special: special tokens, at the end of the vocabulary, or at its start with `first`.
        add_bos, add_eos: put the token around each text that is tokenized with special tokens.
        named: further attributes of the tokenizer that name a token, as `image_token`.
        ordinary: tokens added whole that are not special.
        roles: `bos_token`, `eos_token`, … and `padding_side`.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - (0 if first else len(special)),
        special_tokens=list(special) if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    if add_bos or add_eos:
        bos, eos = roles.get("bos_token"), roles.get("eos_token")
        single = " ".join([*([f"{bos}:0"] if add_bos else []), "$A:0", *([f"{eos}:0"] if add_eos else [])])
        used = [token for token, wanted in ((bos, add_bos), (eos, add_eos)) if wanted and token]
        bpe.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} $B:1",
            special_tokens=[(token, bpe.token_to_id(token)) for token in used],
        )
    named = named or {}
    others = [token for token in special if token not in roles.values() and token not in named.values()]
    more = {"model_specific_special_tokens": named} if named else {}
    return kind(
        tokenizer_object=bpe,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        **more,
        **roles,
    )


def text(**more: Any) -> dict[str, Any]:
    return {**TEXT, **more}


def token_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def clip(**more: Any) -> dict[str, Any]:
    sizes = {"image_size": SIDE, "patch_size": 14, "projection_dim": WIDTH, "num_hidden_layers": 3}
    return {"model_type": "clip_vision_model", **TOWER, **sizes, **more}


def siglip(**more: Any) -> dict[str, Any]:
    sizes = {"image_size": SIDE, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "siglip_vision_model", **TOWER, **sizes, **more}


def square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def with_ends(model: Any, **tokens: Any) -> Any:
    """The model with a generation config that ends at these tokens."""
    model.generation_config = tf.GenerationConfig(**tokens, do_sample=False)
    return model


def sequential_experts(**more: Any) -> dict[str, Any]:
    """Sizes of a mixture of four experts, two of them for each token."""
    return {"num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, **more}
