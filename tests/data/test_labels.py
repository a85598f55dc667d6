"""Answers are found in the tokens whatever the processor reports, and the tokens decode to the answers."""

from pathlib import Path

import numpy as np
import pytest
from tokenize_kit import CONVERSATIONS, encoder_of, images_for

from vlmtune.data.encoded_example import ANSWER, TEMPLATE
from vlmtune.data.labels import token_kinds, wrong_answer

every_conversation = pytest.mark.parametrize("conversation", CONVERSATIONS)
families = pytest.mark.parametrize("family", ["llava", "mllama", "smolvlm"])


@families
@every_conversation
@pytest.mark.parametrize("reported", ["nothing", "wrong offsets", "replacements alone"])
def test_answers_are_found_without_the_processors_offsets(
    models: Path, family: str, conversation: str, reported: str
) -> None:
    encoder, messages = encoder_of(models / family), CONVERSATIONS[conversation]
    images = images_for(messages)
    example, chat = encoder.encode(messages, images), encoder.template.render(messages)
    features = encoder.features([(messages, images)])
    assert features.offsets is not None
    offsets = features.offsets[0] + 7 if reported == "wrong offsets" else None
    image_replacements = features.image_replacements[0] if reported == "replacements alone" else []
    kinds, problem = token_kinds(
        encoder.tokenizer,
        chat,
        encoder.template.renderer.image_token,
        encoder.vision_token_ids,
        features.ids[0],
        offsets,
        image_replacements,
    )
    assert problem is None
    assert np.array_equal(kinds == ANSWER, example.kinds == ANSWER)


@families
@pytest.mark.parametrize("shift", [-1, 1])
def test_tokens_beside_an_answer_are_named(models: Path, family: str, shift: int) -> None:
    encoder, messages = encoder_of(models / family), CONVERSATIONS["one turn"]
    example, chat = encoder.encode(messages, images_for(messages)), encoder.template.render(messages)
    assert wrong_answer(encoder.tokenizer, chat, example.input_ids, example.kinds) is None
    shifted = np.roll(example.kinds, shift)
    shifted[0] = TEMPLATE
    reason = wrong_answer(encoder.tokenizer, chat, example.input_ids, shifted)
    assert reason is not None
    assert "There are five people." in reason


def test_an_answer_without_tokens_is_counted(models: Path) -> None:
    encoder, messages = encoder_of(models / "llava"), CONVERSATIONS["one turn"]
    example, chat = encoder.encode(messages, images_for(messages)), encoder.template.render(messages)
    none = np.full(len(example.kinds), TEMPLATE, dtype=np.uint8)
    assert (
        wrong_answer(encoder.tokenizer, chat, example.input_ids, none)
        == "1 answers, but 0 labelled runs of tokens"
    )
