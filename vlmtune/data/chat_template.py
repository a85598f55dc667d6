"""Render a conversation as the text that the processor gets, and find its questions and answers in that text.

The chat template is rendered twice. With a placeholder in place of each text, the rendering shows what the
template itself writes (its literals). With the texts, it proves that the template only inserts them between
the literals. So the spans are right for every template, with or without `{% generation %}` tags.

The last answer follows the template's own generation prompt, so that the model sees the same words in
training as when it is served. If the template can switch thinking off, it is off, unless the answer contains
a thought.
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
# Special tokens that are allowed in texts: they mark boxes and the names of objects.
BOX_TOKENS = {
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|begin_of_box|>", "<|end_of_box|>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
}


@dataclass(frozen=True)
class ChatText:
    """A conversation as text, up to the end of its last answer.

    Attributes:
        spans: (kind, start, end) in characters of each text of a turn; the kind is TEXT or ANSWER. An
            answer's span includes its end token, and words before the answer that are not in the generation
            prompt.
        options: the template's options that the text was rendered with; serving needs the same options.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]
    options: Options

    @property
    def answers(self) -> list[tuple[int, int]]:
        """(start, end) of each answer. Adjacent texts of one answer are joined."""
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
        renderer: renders messages. It has the template's source and the texts that stand for images and
            videos.
        special: pattern of the tokenizer's special tokens, except BOX_TOKENS.

    Raises:
        ModelError: the processor has no token for an image, or several templates and no default.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.renderer = TemplateRenderer(processor)
        # `all_special_tokens` lacks Llama's headers and Idefics' tile tokens, which only their entries in the
        # vocabulary mark as special.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        special -= BOX_TOKENS
        ordered = sorted(special, key=lambda token: (-len(token), token))
        self.special = re.compile("|".join(re.escape(token) for token in ordered) or r"(?!)")

    def render(self, messages: Sequence[Message]) -> ChatText:
        """Render a conversation of typed parts.

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
        rendered = self.renderer.apply(
            rendering.rewrite(messages, self.renderer.image_token), **rendering.options
        )
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
        """Whether a finished conversation has the generation prompt before its answer; and the options.

        It is tried with one question and its answer.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        rendering = self.renderer.rendering(json.dumps(with_placeholders([question, answer])), False)
        return rendering.agrees, rendering.options

    def generation_prompt(self, options: Options) -> str:
        """The template's text for one question, up to where the model answers.

        Raises:
            EncodeError: the template refuses the question.
        """
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        rewrite = self.renderer.rewrite_for(with_placeholders([question]))
        return self.renderer.apply(
            rewrite([question], self.renderer.image_token), add_generation_prompt=True, **options
        )

    def _assemble(self, rendering: Rendering, turns: list[tuple[int, str]], texts: list[str]) -> ChatText:
        """Join literals and texts. Each answer is closed with an end token, also if the template has none.

        Args:
            turns: (number, role) of the turn of each text.
            texts: the texts of the conversation, in order.
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
                out, after = (
                    out + after,
                    "",
                )  # the literal between two texts of one answer is part of the answer
            elif answers:
                closing = self._closing(after)
                out += after[: len(closing)] if closing else self.tokenizer.eos_token
                after = after[len(closing) :]
                end_of_answers = len(out)
            spans.append((ANSWER if answers else TEXT, start, len(out)))
            out, before = out + after, turn
        return ChatText(out[:end_of_answers] if end_of_answers else out, tuple(spans), rendering.options)

    def _render_thought(self, messages: Sequence[Message], rendering: Rendering, rendered: str) -> ChatText:
        """Render a conversation whose last answer has a thought that the template formats.

        The answer is all text after the prompt.
        """
        question = self.renderer.apply(
            rendering.rewrite(messages[:-1], self.renderer.image_token),
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
        """White space and the special token with which `after` ends an answer; empty if there is none."""
        match = self.special.match(after, len(after) - len(after.lstrip()))
        return "" if match is None or match.group() == self.renderer.image_token else after[: match.end()]


def _fill(literals: list[str], rendered: str, texts: list[str]) -> list[str] | None:
    """Find the texts, unchanged or stripped, between the literals in `rendered`; None if one is not there."""
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
