"""A conversation → the text that the model's processor gets, and where its questions and answers are in it.

The template is rendered twice: once with a placeholder in place of each text, which shows what the template
itself writes (its literals), and once with the texts, which proves that the template only inserts them. So
spans are right for every template, with or without `{% generation %}` tags.

What precedes the last answer is the generation prompt itself, so that training sees what serving gives the
model. Where the template can switch thinking off, it is off, unless the answer holds a thought.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.encoded_example import ANSWER, TEXT
from vlmtune.data.template_messages import Message, text_parts, with_placeholders
from vlmtune.data.template_rendering import EncodeError, Options, Rendering, TemplateRenderer

END_OF_THOUGHT = "</think>"
# Special tokens that are content: what stands around boxes and their names, also where people write it.
BOX_TOKENS = {
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|begin_of_box|>", "<|end_of_box|>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
}


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
        self.renderer = TemplateRenderer(processor)
        self.source, self.has_date = self.renderer.source, self.renderer.has_date
        self.image_token, self.video_token = self.renderer.image_token, self.renderer.video_token
        # `all_special_tokens` lacks some: Llama's headers and Idefics' tile tokens are special by their entry
        # in the vocabulary alone.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        special -= BOX_TOKENS
        ordered = sorted(special, key=lambda token: (-len(token), token))
        self.special = re.compile("|".join(re.escape(token) for token in ordered) or r"(?!)")

    def render(self, messages: Sequence[Message]) -> ChatText:
        """The text of a conversation of typed parts.

        Raises:
            EncodeError: a text holds one of the model's special tokens, or the template refuses, changes or
                leaves out a part of the conversation.
        """
        texts = [(turn, part["text"]) for turn, part in text_parts(messages)]
        for _, text in texts:
            if match := self.special.search(text):
                raise EncodeError(
                    f"the text contains {match.group()!r}, a special token of this model: remove it"
                )
        thought = any(
            END_OF_THOUGHT in text and messages[turn]["role"] == "assistant" for turn, text in texts
        )
        rendering = self.renderer.rendering(json.dumps(with_placeholders(messages)), thought)
        rendered = self.renderer.apply(rendering.rewrite(messages, self.image_token), **rendering.options)
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
        rendering = self.renderer.rendering(json.dumps(with_placeholders([question, answer])), False)
        return rendering.agrees, rendering.options

    def generation_prompt(self, options: Options) -> str:
        """What the template writes for a question that is to be answered.

        Raises:
            EncodeError: it refuses a question.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        rewrite = self.renderer.rewrite_for(with_placeholders([question]))
        return self.renderer.apply(
            rewrite([question], self.image_token), add_generation_prompt=True, **options
        )

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
        question = self.renderer.apply(
            rendering.rewrite(messages[:-1], self.image_token),
            add_generation_prompt=True,
            **rendering.options,
        )
        tail = rendering.literals[-1]
        earlier = [part["text"] for _, part in text_parts(messages[:-1])]
        answer = [part["text"] for part in messages[-1]["content"]]
        literals = self.renderer.literals(
            with_placeholders(messages[:-1]),
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
        turns = [(turn, messages[turn]["role"]) for turn, _ in text_parts(messages[:-1])]
        last = (len(messages) - 1, "assistant")
        whole = Rendering(rendering.rewrite, rendering.options, [], [*literals, tail], "", agrees=True)
        return self._assemble(whole, [*turns, last], [*filled, trained])

    def _closing(self, after: str) -> str:
        """What closes an answer: white space and one special token; empty if the template writes none."""
        match = self.special.match(after, len(after) - len(after.lstrip()))
        return "" if match is None or match.group() == self.image_token else after[: match.end()]


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
