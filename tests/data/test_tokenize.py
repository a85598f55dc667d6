"""Which tokens are trained on, seen by decoding them, for every family and template."""

from pathlib import Path

import numpy as np
import pytest
from tokenize_kit import (
    CONVERSATIONS,
    IMAGE_PART,
    decoded,
    encoder_of,
    images_for,
    letters,
    noise_image,
    texts_of,
    turn,
)

from vlmtune.data.encoded_example import (
    ANSWER,
    IGNORED,
    IMAGE,
    TEXT,
)
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.template_rendering import EncodeError
from vlmtune.data.template_source import BUILTIN_TEMPLATE
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model_ref import ModelRef

# The form of the template that llava-hf/llava-1.5-7b-hf ships: a space after each text, no end token, images
# first.
PUBLIC_LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
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


every_setup = pytest.mark.parametrize("setup", SETUPS)

every_conversation = pytest.mark.parametrize("conversation", CONVERSATIONS)


def encoder_for(models: Path, setup: str) -> RowEncoder:
    family, template, _ = SETUPS[setup]
    return encoder_of(models / family, template)


@every_setup
@every_conversation
def test_loss_is_on_the_answers_and_their_end_tokens_alone(
    models: Path, setup: str, conversation: str
) -> None:
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    images = images_for(messages)
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
    images, text = images_for(messages), encoder.chat_text(messages)
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
    placeholders = np.isin(example.input_ids, encoder.vision_token_ids)
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
    ids = encoder.encode(messages, images_for(messages)).input_ids
    assert np.flatnonzero(ids == encoder.tokenizer.bos_token_id).tolist() == [0]


@every_setup
@every_conversation
def test_prompt_is_what_the_processor_generates_from(models: Path, setup: str, conversation: str) -> None:
    """The same tokens as `apply_chat_template(add_generation_prompt=True)` on the messages before the last
    answer."""
    encoder, messages = encoder_for(models, setup), CONVERSATIONS[conversation]
    images = images_for(messages)
    given_images = iter(images)
    before = [
        {
            **message,
            "content": [
                {**part, "image": next(given_images)} if part == IMAGE_PART else part
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
    "raises": (
        "{{ raise_exception('No system message, please.') }}",
        "refuses this conversation: No system message, please",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_does_more_than_put_the_texts_in_is_refused(models: Path, case: str) -> None:
    template, message = REFUSED[case]
    conversation = [
        turn("system", "Be brief."),
        turn("user", IMAGE_PART, "Where?"),
        turn("assistant", "Here."),
    ]
    plain = encoder_of(models / "llava", BODY)
    assert decoded(plain, plain.encode(conversation, [noise_image()]), ANSWER) == ["Here.</s>"]
    with pytest.raises(EncodeError, match=message):
        encoder_of(models / "llava", template).encode(conversation, [noise_image()])


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ m.content | trim }}", "{{ '' + m.content }}"])
def test_a_template_for_plain_strings_gets_them(models: Path, content: str) -> None:
    """A list of parts would be written as Python shows it, or raise a TypeError."""
    template = "{% for m in messages %}{{ m.role }}: " + content + "\n{% endfor %}"
    encoder = encoder_of(models / "llava", template)
    text = encoder.encode(CONVERSATIONS["text only"], [])
    assert decoded(encoder, text, ANSWER) == ["A horizontal member.\nIt carries the floor.</s>"]
    shown = encoder.encode(CONVERSATIONS["two images"], [noise_image(), noise_image()])
    assert decoded(encoder, shown, ANSWER) == ["The second.</s>"]
    assert "user: <image>\n<image>\nWhich is busier?" in encoder.chat_text(CONVERSATIONS["two images"])


def test_raw_pixels_are_the_resized_ones(models: Path) -> None:
    messages = CONVERSATIONS["one turn"]
    processor = ModelRef(str(models / "llava")).processor()
    encoder = RowEncoder(processor, find_input_format(processor))
    example = encoder.encode(messages, [noise_image(56, 56)])  # already of the model's size
    assert example.tensors["pixel_values"].dtype == np.uint8
    assert np.array_equal(
        example.tensors["pixel_values"][0], np.asarray(noise_image(56, 56)).transpose(2, 0, 1)
    )
