"""What precedes an answer in training is what the template writes when it is asked for one."""

from pathlib import Path

import pytest
from families.templates import chat_template
from tokenize_kit import IMAGE_PART, turn

from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.template_rendering import EncodeError
from vlmtune.errors import ModelError
from vlmtune.model_ref import ModelRef

ROW = [turn("user", "How many?"), turn("assistant", "3")]
# A template, its words for LLaVA's tokenizer, what an answer's span is, and how its prompt ends.
CASES = {
    "a thought closed by the prompt alone": (
        "gemma4",
        "3</s>",
        "<|turn>model\n<|channel>thought\n<channel|>",
    ),
    "an empty thought with thinking off": ("qwen3_5", "3</s>", "assistant\n<think>\n\n</think>\n\n"),
    "a question that ends otherwise": (
        "glm45v",
        "3</s>",
        "How many?/nothink<|assistant|>\n<think></think>\n",
    ),
    "a space that no prompt has": ("llava_next_mistral", " 3</s>", "[INST] How many? [/INST]"),
    "a space that the prompt lacks": ("llava_onevision", "3</s>", "<|im_start|>assistant\n"),
}


def template_of(models: Path, source: str | dict[str, str]) -> ChatTemplate:
    processor = ModelRef(str(models / "llava")).processor()
    processor.chat_template = source
    return ChatTemplate(processor)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_stands_behind_the_generation_prompt(models: Path, case: str) -> None:
    name, answer, opening = CASES[case]
    template = template_of(models, chat_template(name, **{"<turn|>": "</s>", "<|im_end|>": "</s>"}))
    chat = template.render(ROW)
    ((start, end),) = chat.answers
    assert chat.text[start:end] == answer
    served = template.processor.apply_chat_template(
        ROW[:1], add_generation_prompt=True, tokenize=False, **chat.options
    )
    assert chat.text[:start] == served
    assert served.endswith(opening)


def test_a_thought_is_trained_behind_an_open_one(models: Path) -> None:
    template = template_of(models, chat_template("qwen3_5", **{"<|im_end|>": "</s>"}))
    chat = template.render([ROW[0], turn("assistant", "<think>one and two</think>3")])
    ((start, end),) = chat.answers
    assert chat.text[start:end] == "one and two\n</think>\n\n3</s>"
    assert chat.text[:start].endswith("assistant\n<think>\n")
    assert chat.options == {"enable_thinking": True}


def test_an_earlier_thought_that_the_template_drops_is_refused(models: Path) -> None:
    template = template_of(models, chat_template("qwen3_5"))
    earlier = [
        ROW[0],
        turn("assistant", "<think>one</think>3"),
        turn("user", "And now?"),
        turn("assistant", "4"),
    ]
    with pytest.raises(EncodeError, match="thought"):
        template.render(earlier)


def test_a_system_turn_that_is_stripped_as_a_string_is_given_as_one(models: Path) -> None:
    template = template_of(models, chat_template("llama3_dated", **{"<|image|>": "<image>"}))
    chat = template.render([turn("system", "Be brief."), *ROW])
    assert "Today Date: 26 Jul 2024\n\nBe brief." in chat.text, "the same on every day"
    with pytest.raises(EncodeError, match="incompatible with system messages"):
        template.render([turn("system", "Be brief."), turn("user", IMAGE_PART, "How many?"), ROW[1]])


def test_of_several_templates_the_default_is_taken(models: Path) -> None:
    source = chat_template("llava_vicuna")
    assert template_of(models, {"rag": "x", "default": source}).renderer.source == source
    with pytest.raises(ModelError, match="templates rag, tools and none of the name 'default'"):
        template_of(models, {"rag": "x", "tools": "y"})
