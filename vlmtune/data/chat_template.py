"""A conversation → the text that the model's processor gets, and where its questions and answers are in it.

The template is rendered twice: once with a placeholder in place of each text, which shows what the template
itself writes (its literals), and once with the texts, which proves that the template only inserts them. So
spans are right for every template, with or without `{% generation %}` tags.

What precedes the last answer is the generation prompt itself, so that training sees what serving gives the
model. Where the template can switch thinking off, it is off, unless the answer holds a thought.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2

from vlmtune.data.encoded_example import ANSWER, TEXT
from vlmtune.errors import ModelError
from vlmtune.library_errors import LIBRARY_ERRORS

Message = dict[str, Any]
Options = dict[str, bool]
# Messages and the model's image token → the messages in the form that a template understands.
MessageRewrite = Callable[[Sequence[Message], str], list[Message]]

# LLaVA-1.5's format, for models that ship no chat template: images first, then the text of a turn.
BUILTIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
PLACEHOLDER = re.compile(r"vlmtune(\d+)text")
# Templates that write today's date get this one, Llama's own default: a row is the same on every day.
FIXED_DATE = date(2024, 7, 26)
DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# What templates call their switch of thinking: a variable, not a field or a string.
THINKING_SWITCH = re.compile(r"(?<![.\w'\"\[])(enable_thinking|thinking)(?![\w'\"\]])")
END_OF_THOUGHT = "</think>"
# Special tokens that are content: what stands around boxes and their names, also where people write it.
BOX_TOKENS = {
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|begin_of_box|>", "<|end_of_box|>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
}


class EncodeError(ValueError):
    """This model's template, tokenizer or processor cannot take a conversation. The message says why."""


class TemplateRefusalError(EncodeError):
    """The template itself refuses a conversation, in its author's words."""


@dataclass(frozen=True)
class ChatText:
    """A conversation as text, up to the end of its last answer.

    Attributes:
        spans: (kind, start, end) in characters of each person's text: TEXT or ANSWER. An answer's span ends
            with its end token and begins with what the generation prompt lacks.
        options: the template's options that the text was rendered with; serving needs the same.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]
    options: Options

    @property
    def answers(self) -> list[tuple[int, int]]:
        """(start, end) of each answer. Texts of one answer that follow on each other are one."""
        merged: list[tuple[int, int]] = []
        for kind, start, end in self.spans:
            if kind != ANSWER:
                continue
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged


@dataclass(frozen=True)
class Rendering:
    """How conversations that differ only in their texts are rendered.

    Attributes:
        rewrite: brings the messages into the form that the template understands.
        options: of the template.
        literals: what the template writes before, between and after the texts of a finished conversation.
        trained_literals: the same, with the generation prompt before the last answer.
        unprompted: what the template writes before an answer beyond the generation prompt: the model has to
            generate it.
        agrees: whether a finished conversation has the generation prompt before its last answer.
    """

    rewrite: MessageRewrite
    options: Options
    literals: list[str]
    trained_literals: list[str]
    unprompted: str
    agrees: bool


class ChatTemplate:
    """The chat template of a processor.

    Attributes:
        source: the template, its date fixed.
        has_date: whether it asks for today's date.
        image_token: the text that stands for an image.
        video_token: the text that stands for a video; None where the processor takes none.
        special: finds the tokenizer's special tokens in a text, those of boxes apart.

    Raises:
        ModelError: the processor has no token for an image, or several templates and no default.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token = _image_token(processor)
        self.video_token = _video_token(processor)
        template = _source(processor, self.image_token)
        self.has_date = DATE_CALL.search(template) is not None
        self.source = DATE_CALL.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)
        # `all_special_tokens` lacks some: Llama's headers and Idefics' tile tokens are special by their entry
        # in the vocabulary alone.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        special -= BOX_TOKENS
        ordered = sorted(special, key=lambda token: (-len(token), token))
        self.special = re.compile("|".join(re.escape(token) for token in ordered) or r"(?!)")
        self.switches = sorted(set(THINKING_SWITCH.findall(self.source)))
        # Conversations that differ only in their texts share one; rendering costs 0.2 ms.
        self._rendering = lru_cache(maxsize=1024)(self._make_rendering)

    def render(self, messages: Sequence[Message]) -> ChatText:
        """The text of a conversation of typed parts.

        Raises:
            EncodeError: a text holds one of the model's special tokens, or the template refuses, changes or
                leaves out a part of the conversation.
        """
        texts = [(turn, part["text"]) for turn, part in _text_parts(messages)]
        for _, text in texts:
            if match := self.special.search(text):
                raise EncodeError(
                    f"the text contains {match.group()!r}, a special token of this model: remove it"
                )
        thought = any(
            END_OF_THOUGHT in text and messages[turn]["role"] == "assistant" for turn, text in texts
        )
        rendering = self._rendering(json.dumps(_with_placeholders(messages)), thought)
        rendered = self._apply(rendering.rewrite(messages, self.image_token), **rendering.options)
        filled = _fill(rendering.literals, rendered, [text for _, text in texts])
        if filled is None and thought:
            return self._render_thought(messages, rendering, rendered)
        if filled is None:
            raise EncodeError(
                "the chat template rewrites the text of this conversation, "
                "so that its answers cannot be told apart"
            )
        turns = [(turn, messages[turn]["role"]) for turn, _ in texts]
        return self._assemble(rendering, turns, filled)

    def agreement(self) -> tuple[bool, Options]:
        """Whether training and serving see the same words before an answer, and with which options.

        Found on one question and its answer. Where they would differ, the generation prompt is trained.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        rendering = self._rendering(json.dumps(_with_placeholders([question, answer])), False)
        return rendering.agrees, rendering.options

    def generation_prompt(self, options: Options) -> str:
        """What the template writes for a question that is to be answered.

        Raises:
            EncodeError: it refuses a question.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        rewrite = self._rewrite(_with_placeholders([question]))
        return self._apply(rewrite([question], self.image_token), add_generation_prompt=True, **options)

    def _make_rendering(self, with_placeholders: str, thought: bool) -> Rendering:
        messages = json.loads(with_placeholders)
        rewrite = self._rewrite(messages)
        renderings = [self._with_options(messages, rewrite, options) for options in self._options(thought)]
        # The first whose training text is a finished conversation; else the one with thinking switched off.
        return next((rendering for rendering in renderings if rendering.agrees), renderings[-1])

    def _options(self, thought: bool) -> list[Options]:
        if not self.switches:
            return [{}]
        switched = dict.fromkeys(self.switches, thought)
        return [switched] if thought else [{}, switched]

    def _rewrite(self, messages: Sequence[Message]) -> MessageRewrite:
        """The first rewrite that makes the template render every part of the messages."""
        errors: list[EncodeError] = []
        rewrites: list[MessageRewrite] = [_as_parts, _text_as_strings]
        if not _count(messages, "video"):
            rewrites.append(_all_as_strings)
        for rewrite in rewrites:
            try:
                self._literals(messages, rewrite)
            except TemplateRefusalError:
                raise
            except EncodeError as error:
                errors.append(error)
            else:
                return rewrite
        raise errors[0]

    def _with_options(
        self,
        messages: Sequence[Message],
        rewrite: MessageRewrite,
        options: Options,
    ) -> Rendering:
        literals = self._literals(messages, rewrite, **options)
        if messages[-1]["role"] != "assistant":
            return Rendering(rewrite, options, literals, literals, "", agrees=True)
        prompt = self._literals(messages[:-1], rewrite, add_generation_prompt=True, **options)
        last = len(prompt) - 1  # texts before the last answer
        shown, served = literals[last], prompt[last]
        if literals[:last] == prompt[:last] and shown.startswith(served):
            unprompted = shown.removeprefix(served)
            agrees = not unprompted.strip()
            if not agrees and self._literals(messages[:-1], rewrite, **options)[-1] == served:
                unprompted = ""  # the template has no generation prompt: who serves it writes the role
            return Rendering(rewrite, options, literals, literals, unprompted, agrees=agrees)
        return Rendering(rewrite, options, literals, [*prompt, *literals[last + 1 :]], "", agrees=False)

    def _literals(
        self,
        messages: Sequence[Message],
        rewrite: MessageRewrite,
        **options: bool,
    ) -> list[str]:
        """What the template writes before, between and after the placeholders in the messages."""
        rendered = self._apply(rewrite(messages, self.image_token), **options)
        literals = PLACEHOLDER.split(rendered)
        placeholders = [part["text"] for _, part in _text_parts(messages)]
        if [f"vlmtune{number}text" for number in literals[1::2]] != placeholders:
            raise EncodeError(
                "the chat template leaves out or reorders parts of this conversation "
                "(a role that it does not know?)"
            )
        images, videos = (_count(messages, kind) for kind in ("image", "video"))
        if videos and (self.video_token is None or rendered.count(self.video_token) != videos):
            raise EncodeError(
                "the row has a video, and this model's chat template shows none: save its frames as images"
            )
        if rendered.count(self.image_token) != images or "'type': 'text'" in rendered:
            raise EncodeError(
                "the chat template is one for text alone: "
                "it shows content of typed parts, or its images, wrongly"
            )
        return literals[0::2]

    def _assemble(self, rendering: Rendering, turns: list[tuple[int, str]], texts: list[str]) -> ChatText:
        """Join template and texts, closing each answer with an end token where the template has none.

        Args:
            turns: (number, role) of the turn that each text belongs to.
        """
        out, spans, end_of_answers = rendering.trained_literals[0], [], 0
        before, unprompted = None, rendering.unprompted
        following_turns = [*turns[1:], None]
        for turn, following, text, after in zip(
            turns, following_turns, texts, rendering.trained_literals[1:], strict=True
        ):
            answers = turn[1] == "assistant"
            start = len(out)
            if answers and turn != before and out.endswith(unprompted):
                start -= len(unprompted)
            out += text
            if answers and turn == following:
                out, after = out + after, ""  # what is between two texts of one answer is part of it
            elif answers:
                closing = self._closing(after)
                out += after[: len(closing)] if closing else self.tokenizer.eos_token
                after = after[len(closing) :]
                end_of_answers = len(out)
            spans.append((ANSWER if answers else TEXT, start, len(out)))
            out, before = out + after, turn
        return ChatText(out[:end_of_answers] if end_of_answers else out, tuple(spans), rendering.options)

    def _render_thought(self, messages: Sequence[Message], rendering: Rendering, rendered: str) -> ChatText:
        """A last answer whose thought the template formats: all that follows the prompt is trained on."""
        question = self._apply(
            rendering.rewrite(messages[:-1], self.image_token),
            add_generation_prompt=True,
            **rendering.options,
        )
        tail = rendering.literals[-1]
        earlier = [part["text"] for _, part in _text_parts(messages[:-1])]
        answer = [part["text"] for part in messages[-1]["content"]]
        literals = self._literals(
            _with_placeholders(messages[:-1]),
            rendering.rewrite,
            add_generation_prompt=True,
            **rendering.options,
        )
        filled = _fill(literals, question, earlier)
        trained = rendered[len(question) : len(rendered) - len(tail)]
        if (
            filled is None
            or not (rendered.startswith(question) and rendered.endswith(tail))
            or not _letters(question + trained).endswith(_letters("".join(answer)))
        ):
            raise EncodeError(
                "the chat template changes the thought (<think>) of this conversation, "
                "so that it cannot be trained on as it stands"
            )
        turns = [(turn, messages[turn]["role"]) for turn, _ in _text_parts(messages[:-1])]
        last = (len(messages) - 1, "assistant")
        whole = Rendering(rendering.rewrite, rendering.options, [], [*literals, tail], "", agrees=True)
        return self._assemble(whole, [*turns, last], [*filled, trained])

    def _closing(self, after: str) -> str:
        """What closes an answer: white space and one special token; empty if the template writes none."""
        match = self.special.match(after, len(after) - len(after.lstrip()))
        return "" if match is None or match.group() == self.image_token else after[: match.end()]

    def _apply(self, messages: list[Message], **options: bool) -> str:
        try:
            rendered: str = self.processor.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, **options
            )
        except (jinja2.TemplateError, *LIBRARY_ERRORS) as error:
            refusal = TemplateRefusalError if type(error) is jinja2.TemplateError else EncodeError
            raise refusal(f"the chat template refuses this conversation: {error}") from error
        return rendered


def _image_token(processor: Any) -> str:
    for owner in (processor, processor.tokenizer):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise ModelError(
        f"{type(processor).__name__} has no token that stands for an image in a text: "
        "its model answers to one image alone, not in a conversation, and cannot be tuned here"
    )


def _video_token(processor: Any) -> str | None:
    """The text that stands for a video, where the processor reads videos."""
    if getattr(processor, "video_processor", None) is None:
        return None
    tokens = (getattr(owner, "video_token", None) for owner in (processor, processor.tokenizer))
    return next((str(token) for token in tokens if token is not None), None)


def _count(messages: Sequence[Message], kind: str) -> int:
    """How many parts of a kind the messages have."""
    return sum(part["type"] == kind for message in messages for part in message["content"])


def template_of(processor: Any) -> str:
    """The chat template that rows are rendered with: the processor's own, or the built-in one.

    Raises:
        ModelError: the processor has several templates and none of the name 'default', or no image token.
    """
    return _source(processor, _image_token(processor))


def _source(processor: Any, image_token: str) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        template = BUILTIN_TEMPLATE.replace("<image>", image_token)
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                f"the processor has the chat templates {', '.join(template)} and none of the name 'default': "
                "keep the one to use as chat_template.jinja in the model's folder"
            )
        template = template["default"]
    return str(template)


def _text_parts(messages: Sequence[Message]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the turn, part) of each text."""
    for turn, message in enumerate(messages):
        for part in message["content"]:
            if part["type"] == "text":
                yield turn, part


def _with_placeholders(messages: Sequence[Message]) -> list[Message]:
    """The messages with `vlmtune<n>text` in place of the n-th text."""
    changed: list[Message] = []
    number = 0
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                part, number = {"type": "text", "text": f"vlmtune{number}text"}, number + 1
            content.append(part)
        changed.append({"role": message["role"], "content": content})
    return changed


def _as_parts(messages: Sequence[Message], image_token: str) -> list[Message]:
    """As they are: every content is a list of typed parts."""
    return list(messages)


def _text_as_strings(messages: Sequence[Message], image_token: str) -> list[Message]:
    """Messages without an image or video have strings as content, as Llama's system turn needs it."""
    return [
        message
        if any(part["type"] != "text" for part in message["content"])
        else {"role": message["role"], "content": "\n".join(part["text"] for part in message["content"])}
        for message in messages
    ]


def _all_as_strings(messages: Sequence[Message], image_token: str) -> list[Message]:
    """Every content is a string, with a line for each image, as vLLM does for templates that need strings."""
    return [
        {
            "role": message["role"],
            "content": "\n".join(
                image_token if part["type"] == "image" else part["text"] for part in message["content"]
            ),
        }
        for message in messages
    ]


def _fill(literals: list[str], rendered: str, texts: list[str]) -> list[str] | None:
    """The texts as `rendered` holds them between the literals, as they are or stripped; None if neither."""
    if not rendered.startswith(literals[0]):
        return None
    filled, position = [], len(literals[0])
    for text, after in zip(texts, literals[1:], strict=True):
        for variant in (text, text.strip(), text.rstrip(), text.lstrip()):
            if rendered.startswith(variant + after, position):
                filled.append(variant)
                position += len(variant) + len(after)
                break
        else:
            return None
    return filled if position == len(rendered) else None


def _letters(text: str) -> str:
    return "".join(text.split())
