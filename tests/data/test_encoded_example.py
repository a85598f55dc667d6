"""What shortening keeps of an example, and the smallest length that it accepts."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenize_kit import (
    CONVERSATIONS,
    IMAGE_PART,
    Message,
    decoded,
    encoder_of,
    letters,
    noise_image,
    runs,
    texts_of,
    turn,
)
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.data.encoded_example import (
    ANSWER,
    TEMPLATE,
    TEXT,
    EncodedExample,
    required_length,
    shorten,
)

WORDS = st.text("ab Z5.,\n-가나명é😀", min_size=1, max_size=30).filter(lambda text: text.strip() != "")

SIZES = st.tuples(st.integers(8, 130), st.integers(8, 130))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[Image.Image]]:
    messages = [turn("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(
            st.permutations([IMAGE_PART] * draw(st.integers(0, 2)) + draw(st.lists(WORDS, max_size=2)))
        )
        messages += [
            turn("user", *(question or [draw(WORDS)])),
            turn("assistant", *draw(st.lists(WORDS, min_size=1, max_size=2))),
        ]
    number = sum(part == IMAGE_PART for message in messages for part in message["content"])
    return messages, [noise_image(*draw(SIZES), seed=index) for index in range(number)]


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
qwen = pytest.param("qwen2_5_vl", marks=needs_torchvision)
families = pytest.mark.parametrize("family", ["llava", "mllama", "smolvlm", qwen])

thorough = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@families
@thorough
@given(data=st.data())
def test_shortening_keeps_images_and_what_is_nearest_to_the_answer(
    models: Path, family: str, data: st.DataObject
) -> None:
    messages, images = data.draw(conversations())
    encoder = encoder_of(models / family)
    example = encoder.encode(messages, images)
    assert letters(decoded(encoder, example, ANSWER)) == letters(
        [text + encoder.tokenizer.eos_token for text in texts_of(messages, "assistant")]
    )
    length, needed = len(example.input_ids), required_length(example)
    max_length = data.draw(st.integers(needed, length + 2))
    # Positions in place of ids show which tokens were kept.
    kept = shorten(EncodedExample(np.arange(length), example.kinds, example.tensors), max_length).input_ids
    short = shorten(example, max_length)
    assert len(kept) == min(length, max_length)
    assert np.array_equal(short.input_ids, example.input_ids[kept])
    assert np.array_equal(short.kinds, example.kinds[kept])
    assert np.array_equal(short.labels, example.labels[kept])
    assert short.image_tokens == example.image_tokens
    assert (short.labels >= 0).any()
    for run in runs(np.flatnonzero(example.kinds == ANSWER)):
        stays = np.isin(run, kept)
        assert all(before or not after for before, after in pairwise(stays)), "an answer keeps its start"
    first = np.flatnonzero(example.kinds == ANSWER)[0]
    assert np.isin(np.flatnonzero(example.kinds[:first] == TEMPLATE), kept).all()
    question = np.isin(np.flatnonzero(example.kinds[:first] == TEXT), kept)
    assert all(after or not before for before, after in pairwise(question)), "a question keeps its end"
    for name, value in example.tensors.items():
        assert np.array_equal(short.tensors[name], value[:, kept] if name in example.token_axes else value)


@families
@thorough
@given(data=st.data())
def test_required_length_is_the_smallest_that_is_accepted(
    models: Path, family: str, data: st.DataObject
) -> None:
    messages, images = data.draw(conversations())
    example = encoder_of(models / family).encode(messages, images)
    needed = required_length(example)
    assert len(shorten(example, needed).input_ids) == needed
    with pytest.raises(ValueError, match=f"max_length {needed - 1} cannot hold this row.* need {needed}"):
        shorten(example, needed - 1)


def test_a_row_that_fits_stays_as_it_is(models: Path) -> None:
    example = encoder_of(models / "llava").encode(CONVERSATIONS["one turn"], [noise_image()])
    assert shorten(example, None) is example
    assert shorten(example, len(example.input_ids)) is example


def test_question_and_answer_share_what_is_left(models: Path) -> None:
    encoder = encoder_of(models / "llava")
    example = encoder.encode(
        [turn("user", IMAGE_PART, "abc " * 40 + "the end?"), turn("assistant", "So it is. " + "xyz " * 40)],
        [noise_image()],
    )
    short = shorten(example, required_length(example) - 1 + 20)
    assert (short.kinds == TEXT).sum() == 10
    assert (short.kinds == ANSWER).sum() == 10
    assert decoded(encoder, short, TEXT)[0].endswith("the end?")
    assert decoded(encoder, short, ANSWER)[0].startswith(" So it is.")
