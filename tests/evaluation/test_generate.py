"""Answers and likelihoods of rows in a batch are those of each row alone, and those that plain transformers
gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.images import load_image
from vlmtune.data.tokenize import RowEncoder
from vlmtune.evaluation.generate import (
    BatchBuilder,
    end_tokens,
    generate,
    in_memory,
    likelihoods,
    question,
    reference,
)
from vlmtune.model.base import load_base
from vlmtune.model.fast import skip_padding_mask
from vlmtune.model.lora import attach, lora_config
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef

IMAGE = {"type": "image"}
FAMILIES = [("llava", "nf4"), ("mllama", "int8"), ("smolvlm", "none")]


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


ROWS = [  # messages, number of images, question, reference
    ([turn("user", IMAGE, "How many?"), turn("assistant", "5")], 1, "How many?", "5"),
    (
        [turn("user", "What is a beam, and its use?"), turn("assistant", "거푸집")],
        0,
        "What is a beam, and its use?",
        "거푸집",
    ),
    (
        [
            turn("user", IMAGE, "몇 명 있습니까?"),
            turn("assistant", "세 명"),
            turn("user", "And who?"),
            turn("assistant", "Nobody."),
        ],
        1,
        "And who?",
        "Nobody.",
    ),
    (
        [
            turn("system", "Count."),
            turn("user", IMAGE, "one ", IMAGE, "two"),
            turn("assistant", "3 people."),
        ],
        2,
        "one two",
        "3 people.",
    ),
    ([turn("user", "?"), turn("assistant", "y")], 0, "?", "y"),
]


class Kit:
    """A tiny model and ROWS as it takes them."""

    def __init__(self, folder: Path, frames: Path, quantization: str) -> None:
        self.processor: Any = ModelRef(str(folder)).processor()
        self.tokenizer = self.processor.tokenizer
        self.batches = BatchBuilder(find_input_format(self.processor), self.tokenizer.pad_token_id)
        self.encoder = encoder = RowEncoder(self.processor, self.batches.input_format)
        images = [load_image(str(path)) for path in sorted(frames.iterdir())[:2]]
        self.examples: list[EncodedExample] = [
            encoder.encode(messages, images[:count]) for messages, count, _, _ in ROWS
        ]
        self.images = images
        self.model: Any = load_base(
            ModelRef(str(folder)), quantization=quantization, dtype="float32", device=torch.device("cpu")
        ).eval()  # type: ignore[arg-type]
        self.ends = end_tokens(self.model, self.processor)

    def answer(self, *examples: EncodedExample, tokens: int = 6) -> list[str]:
        return generate(
            self.model, self.tokenizer, self.batches, examples, max_new_tokens=tokens, ends=self.ends
        )


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[0])
def kit(request: pytest.FixtureRequest, models: Path, mall: Path) -> Kit:
    family, quantization = request.param
    return Kit(models / family, mall / "frames", quantization)


def test_a_batch_answers_as_each_row_alone(kit: Kit) -> None:
    alone = [kit.answer(example)[0] for example in kit.examples]
    assert kit.answer(*kit.examples) == alone
    assert len(set(alone)) > 2  # the rows differ, so the answers do


def test_it_answers_as_plain_transformers(kit: Kit) -> None:
    text = kit.processor.apply_chat_template(
        ROWS[0][0][:1], add_generation_prompt=True, chat_template=kit.encoder.template.renderer.source
    )
    inputs = kit.processor(
        images=[[kit.images[0]]],
        text=[text],
        return_tensors="pt",
        add_special_tokens=not text.startswith("<"),
    )
    written = kit.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=kit.ends)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert kit.answer(kit.examples[0]) == [kit.tokenizer.decode(written, skip_special_tokens=True).strip()]


def test_likelihoods_of_a_batch_are_those_of_each_row_and_add_up_to_the_models_own_loss(kit: Kit) -> None:
    together = likelihoods(kit.model, kit.batches, kit.examples)
    for example, (nll, tokens) in zip(kit.examples, together, strict=True):
        assert tokens == (example.labels >= 0).sum()
        assert nll == pytest.approx(likelihoods(kit.model, kit.batches, [example])[0][0], abs=1e-4)
        with torch.no_grad():
            own = kit.model(**kit.batches.batch(kit.model, [example]), use_cache=False).loss
        assert nll / tokens == pytest.approx(float(own), rel=1e-4)


def test_answers_end_where_a_turn_of_the_template_ends(kit: Kit) -> None:
    assert int(kit.examples[0].input_ids[-1]) in kit.ends
    assert kit.tokenizer.eos_token_id in kit.ends


def test_question_and_reference_are_the_words_of_the_row(kit: Kit) -> None:
    for example, (_, _, expected_question, expected_reference) in zip(kit.examples, ROWS, strict=True):
        assert (question(kit.tokenizer, example), reference(kit.tokenizer, example)) == (
            expected_question,
            expected_reference,
        )


def test_a_model_in_training_answers_the_same_and_trains_on(models: Path, mall: Path) -> None:
    """What training does to a model, dropout, gradient checkpointing and the missing padding mask, does not
    reach its answers."""
    kit = Kit(models / "llava", mall / "frames", "nf4")
    expected = kit.answer(*kit.examples)
    targets = target_modules(kit.model, None, lora_vision=False)
    kit.model = attach(
        kit.model, lora_config(kit.model, r=4, alpha=8, dropout=0.5, target_modules=targets), seed=0
    )
    skip_padding_mask(kit.model.get_base_model())
    kit.model.activation_checkpointing_enable({"use_reentrant": False})
    assert kit.answer(*kit.examples) == expected  # a fresh adapter changes nothing
    kit.model.train()
    assert any(parameter.requires_grad for parameter in kit.model.parameters())


def test_a_batch_that_does_not_fit_in_memory_goes_in_halves() -> None:
    sizes = []

    def run(examples: Any) -> list[int]:
        sizes.append(len(examples))
        if len(examples) > 2:
            raise torch.OutOfMemoryError
        return [one * 10 for one in examples]

    assert in_memory(run, list(range(5)), torch.nn.Module()) == [0, 10, 20, 30, 40]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_memory(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()), [0], torch.nn.Module())
