"""Which tokens are trained on, seen by decoding them, for every family and template; and what shortening
keeps."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.data.encoded_example import (
    ANSWER,
    IGNORED,
    IMAGE,
    SEQUENCE_TENSORS,
    TEMPLATE,
    TEXT,
    EncodedExample,
    required_length,
    shorten,
)
from vlmtune.data.tokenize import BUILTIN_TEMPLATE, EncodeError, RowEncoder
from vlmtune.model_ref import ModelRef

Message = dict[str, Any]
PICTURE = {"type": "image"}

# The form of the template that llava-hf/llava-1.5-7b-hf ships: a space after each text, no end token, images
# first.
PUBLIC_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The family, its template where it is not the model's own, and what an answer begins and ends with.
SETUPS = {
    "llava": ("llava", None, " {}</s>"),
    "llava, public template": ("llava", PUBLIC_LLAVA, " {}</s>"),
    "llava, template with BOS": ("llava", "{{ bos_token }}" + PUBLIC_LLAVA, " {}</s>"),
    "llava, template with end token": (
        "llava",
        PUBLIC_LLAVA.replace("{% endfor %}{% endif %}", "{% endfor %}{{ '</s>' }}{% endif %}"),
        " {} </s>",
    ),
    "mllama": ("mllama", None, "{}<|eot_id|>"),
    "smolvlm": ("smolvlm", None, " {}<end_of_utterance>"),
}


def turn(role: str, *parts: Any) -> Message:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [turn("user", PICTURE, "How many people?"), turn("assistant", "There are five people.")],
    "a number": [turn("user", PICTURE, "How many people?"), turn("assistant", "5")],
    "Korean": [
        turn("user", PICTURE, "이 사진에 사람이 몇 명 있습니까?"),
        turn("assistant", "모두 7명입니다. 😀"),
    ],
    "text only": [
        turn("user", "What is a beam?"),
        turn("assistant", "A horizontal member.\nIt carries the floor."),
    ],
    "system and three turns": [
        turn("system", "Answer with a number."),
        turn("user", "Look.", PICTURE, "How many?"),
        turn("assistant", "3 people"),
        turn("user", "And children?"),
        turn("assistant", "1 child"),
        turn("user", "So adults?"),
        turn("assistant", "2 adults"),
    ],
    "two images": [turn("user", PICTURE, PICTURE, "Which is busier?"), turn("assistant", "The second.")],
    "images in later turns": [
        turn("user", "Look at two pictures."),
        turn("assistant", "Show me."),
        turn("user", PICTURE, "One."),
        turn("assistant", "I see."),
        turn("user", PICTURE, "Two. Same place?"),
        turn("assistant", "Yes, the food court."),
    ],
}
every_setup = pytest.mark.parametrize("setup", SETUPS)
every_conversation = pytest.mark.parametrize("conversation", CONVERSATIONS)


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def pictures(messages: list[Message]) -> list[Image.Image]:
    """An image for each image part, each of another shape."""
    number = sum(part["type"] == "image" for message in messages for part in message["content"])
    return [picture(90 - 30 * index, 60 + 20 * index, index) for index in range(number)]


@cache
def encoder_of(folder: Path, template: str | None = None) -> RowEncoder:
    processor = ModelRef(str(folder)).processor()
    if template is not None:
        processor.chat_template = template
    return RowEncoder(processor)


def encoder_for(models: Path, setup: str) -> RowEncoder:
    family, template, _ = SETUPS[setup]
    return encoder_of(models / family, template)


def texts_of(messages: list[Message], *roles: str) -> list[str]:
    return [
        " ".join(part["text"] for part in m["content"] if part["type"] == "text")
        for m in messages
        if m["role"] in roles
    ]


def runs(positions: np.ndarray) -> list[np.ndarray]:
    """Rising positions, cut where they do not follow on each other."""
    return [run for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(run)]


def decoded(encoder: RowEncoder, example: EncodedExample, kind: int) -> list[str]:
    return [
        encoder.tokenizer.decode(example.input_ids[run])
        for run in runs(np.flatnonzero(example.kinds == kind))
    ]


def letters(texts: list[str]) -> str:
    return "".join("".join(texts).split())


@every_setup
@every_conversation
def test_loss_is_on_the_answers_and_their_end_tokens_alone(
    models: Path, setup: str, conversation: str
) -> None:
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    images = pictures(messages)
    example = encoder.encode(messages, images)
    answers = decoded(encoder, example, ANSWER)
    assert answers == [SETUPS[setup][2].format(text) for text in texts_of(messages, "assistant")]
    assert letters(decoded(encoder, example, TEXT)) == letters(texts_of(messages, "system", "user"))
    assert np.array_equal(example.labels, np.where(example.kinds == ANSWER, example.input_ids, IGNORED))
    assert example.labels[-1] == encoder.tokenizer.eos_token_id  # nothing stands behind the last answer


@every_setup
@every_conversation
def test_tokens_and_tensors_are_the_processors_own(models: Path, setup: str, conversation: str) -> None:
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    images, text = pictures(messages), encoder.chat_text(messages)
    example = encoder.encode(messages, images)
    begins = text.startswith(encoder.tokenizer.bos_token)
    own = encoder.processor(
        text=[text],
        **({"images": images} if images else {}),
        add_special_tokens=not begins,
        return_tensors="np",
    )
    assert np.array_equal(example.input_ids, own.pop("input_ids")[0])
    assert own.pop("attention_mask").all()
    assert example.tensors.keys() == own.keys()
    for name, value in own.items():
        assert np.array_equal(example.tensors[name], value), name
    placeholders = example.input_ids == encoder.image_token_id
    assert placeholders.any() == bool(images)
    assert (example.kinds[placeholders] == IMAGE).all()
    marks = set(encoder.tokenizer.convert_ids_to_tokens(example.input_ids[example.kinds == IMAGE].tolist()))
    tiles = {mark for mark in marks if mark.startswith("<row_")} | {
        "<global-img>",
        "<fake_token_around_image>",
        "Ċ",
        "ĊĊ",
    }
    assert marks - {encoder.processor.image_token} <= (tiles if setup == "smolvlm" else set())
    assert example.image_tokens == (example.kinds == IMAGE).sum()


@every_setup
@every_conversation
def test_text_begins_with_one_bos(models: Path, setup: str, conversation: str) -> None:
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    ids = encoder.encode(messages, pictures(messages)).input_ids
    assert np.flatnonzero(ids == encoder.tokenizer.bos_token_id).tolist() == [0]


@every_setup
@every_conversation
def test_prompt_is_what_the_processor_generates_from(models: Path, setup: str, conversation: str) -> None:
    """The same tokens as `apply_chat_template(add_generation_prompt=True)` on the messages before the last
    answer."""
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    images = pictures(messages)
    given_images = iter(images)
    before = [
        {
            **message,
            "content": [
                {**part, "image": next(given_images)} if part == PICTURE else part
                for part in message["content"]
            ],
        }
        for message in messages[:-1]
    ]
    template = encoder.processor.chat_template or BUILTIN_TEMPLATE
    if setup in (
        "llava",
        "llava, public template",
        "llava, template with BOS",
    ):  # as trained: earlier answers have their end token
        template = template.replace(
            "{% generation %}{{ content['text'] + ' '}}", "{% generation %}{{ content['text'] + '</s> '}}"
        )
        template = template.replace("{{ ' ' }}", "{{ '</s> ' if message['role'] == 'assistant' else ' ' }}")
    own = encoder.processor.apply_chat_template(
        before,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    prompt = encoder.encode(messages, images).prompt()
    assert np.array_equal(prompt.input_ids, own.pop("input_ids")[0])
    own.pop("attention_mask")
    assert prompt.tensors.keys() == own.keys()
    for name, value in own.items():
        assert np.array_equal(prompt.tensors[name], value), name


@every_setup
def test_an_answer_in_two_parts_has_one_end(models: Path, setup: str) -> None:
    encoder = encoder_for(models, setup)
    example = encoder.encode([turn("user", "Who?"), turn("assistant", "Two men", "and a child")], [])
    answers = decoded(encoder, example, ANSWER)
    assert [letters([answer]) for answer in answers] == [
        letters([SETUPS[setup][2].format("Two men and a child")])
    ]


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("llava", "</s>"),
        ("llava", "<image>"),
        ("mllama", "<|eot_id|>"),
        ("mllama", "<|start_header_id|>"),
        ("smolvlm", "<row_1_col_2>"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_tokens_in_a_text_are_refused(models: Path, family: str, token: str, role: str) -> None:
    texts = {"system": "Be brief.", "user": "How many?", "assistant": "Five."} | {role: f"Two{token}three"}
    with pytest.raises(EncodeError, match="special token of this model") as refusal:
        encoder_of(models / family).encode([turn(role, text) for role, text in texts.items()], [])
    assert repr(token) in str(refusal.value)


PARTS = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
BODY = "{% for m in messages %}{{ m.role }}: " + PARTS + "\n{% endfor %}"
REFUSED = {
    "rewrites": (BODY.replace("p.text", "p.text | replace('r', 'R')"), "rewrites the text"),
    "drops a role": (
        BODY.replace("in messages", "in messages if m.role != 'system'"),
        "leaves out or reorders",
    ),
    "reorders": (BODY.replace("in messages", "in messages | reverse"), "leaves out or reorders"),
    "repeats": (BODY + "{{ messages[0].content[0].text }}", "leaves out or reorders"),
    "shows no image": (BODY.replace("<image>", ""), "for text alone"),
    "wants plain strings": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "for text alone",
    ),
    "raises": (
        "{{ raise_exception('No system message, please.') }}",
        "refuses this conversation: No system message, please",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_does_more_than_put_the_texts_in_is_refused(models: Path, case: str) -> None:
    template, message = REFUSED[case]
    conversation = [turn("system", "Be brief."), turn("user", PICTURE, "Where?"), turn("assistant", "Here.")]
    plain = encoder_of(models / "llava", BODY)
    assert decoded(plain, plain.encode(conversation, [picture()]), ANSWER) == ["Here.</s>"]
    with pytest.raises(EncodeError, match=message):
        encoder_of(models / "llava", template).encode(conversation, [picture()])


def test_a_template_for_plain_strings_is_refused_without_images_too(models: Path) -> None:
    template, message = REFUSED["wants plain strings"]
    with pytest.raises(EncodeError, match=message):
        encoder_of(models / "llava", template).encode(CONVERSATIONS["text only"], [])


def test_raw_pixels_are_the_resized_ones(models: Path) -> None:
    messages = CONVERSATIONS["one turn"]
    encoder = RowEncoder(ModelRef(str(models / "llava")).processor(), raw_pixels=True)
    example = encoder.encode(messages, [picture(56, 56)])  # already of the model's size
    assert example.tensors["pixel_values"].dtype == np.uint8
    assert np.array_equal(example.tensors["pixel_values"][0], np.asarray(picture(56, 56)).transpose(2, 0, 1))


# --- shortening, as properties of random conversations ---

WORDS = st.text("ab Z5.,\n-가나명é😀", min_size=1, max_size=30).filter(lambda text: text.strip() != "")
SIZES = st.tuples(st.integers(8, 130), st.integers(8, 130))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[Image.Image]]:
    messages = [turn("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(
            st.permutations([PICTURE] * draw(st.integers(0, 2)) + draw(st.lists(WORDS, max_size=2)))
        )
        messages += [
            turn("user", *(question or [draw(WORDS)])),
            turn("assistant", *draw(st.lists(WORDS, min_size=1, max_size=2))),
        ]
    number = sum(part == PICTURE for message in messages for part in message["content"])
    return messages, [picture(*draw(SIZES), seed=index) for index in range(number)]


families = pytest.mark.parametrize(
    "family",
    [
        "llava", "mllama", "smolvlm",
        pytest.param("qwen2_5_vl", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed"),
        ]),
    ],
)  # fmt: skip
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
        assert np.array_equal(short.tensors[name], value[:, kept] if name in SEQUENCE_TENSORS else value)


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
    example = encoder_of(models / "llava").encode(CONVERSATIONS["one turn"], [picture()])
    assert shorten(example, None) is example
    assert shorten(example, len(example.input_ids)) is example


def test_question_and_answer_share_what_is_left(models: Path) -> None:
    encoder = encoder_of(models / "llava")
    example = encoder.encode(
        [turn("user", PICTURE, "abc " * 40 + "the end?"), turn("assistant", "So it is. " + "xyz " * 40)],
        [picture()],
    )
    short = shorten(example, required_length(example) - 1 + 20)
    assert (short.kinds == TEXT).sum() == 10
    assert (short.kinds == ANSWER).sum() == 10
    assert decoded(encoder, short, TEXT)[0].endswith("the end?")
    assert decoded(encoder, short, ANSWER)[0].startswith(" So it is.")
