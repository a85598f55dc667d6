"""Find out how a chat template renders conversations: the form of messages that it takes, and its literals.

The template is rendered with a placeholder in place of each text. The parts between the placeholders are what
the template writes itself, its literals.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2

from vlmtune.data.template_messages import (
    Message,
    MessageRewrite,
    all_as_strings,
    as_parts,
    count_parts,
    text_as_strings,
    text_parts,
)
from vlmtune.data.template_source import image_token_of, template_source, video_token_of
from vlmtune.library_errors import LIBRARY_ERRORS

Options = dict[str, bool]
PLACEHOLDER = re.compile(r"vlmtune(\d+)text")
# Templates that write today's date get this date (Llama's default), so that a row is the same on every day.
FIXED_DATE = date(2024, 7, 26)
DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# The variable with which templates switch thinking on or off; not a field or a string of that name.
THINKING_SWITCH = re.compile(r"(?<![.\w'\"\[])(enable_thinking|thinking)(?![\w'\"\]])")


class EncodeError(ValueError):
    """This model's template, tokenizer or processor cannot take a conversation. The message says why."""


class TemplateRefusalError(EncodeError):
    """The template raises an exception for a conversation. The message is the template's."""


@dataclass(frozen=True)
class Rendering:
    """How a template renders conversations that differ only in their texts.

    Attributes:
        rewrite: changes messages into the form that the template takes.
        options: the template's options.
        literals: the template's text before, between and after the texts of a finished conversation.
        trained_literals: the same, with the generation prompt before the last answer.
        unprompted: the template's text before an answer that is not in the generation prompt, so that the
            model has to generate it.
        agrees: whether a finished conversation has the generation prompt before its last answer.
    """

    rewrite: MessageRewrite
    options: Options
    literals: list[str]
    trained_literals: list[str]
    unprompted: str
    agrees: bool


class TemplateRenderer:
    """Renders messages with the chat template of a processor.

    Attributes:
        source: the template, with FIXED_DATE in place of today's date.
        has_date: whether the template writes today's date.
        image_token: the text that stands for an image.
        video_token: the text that stands for a video; None if the processor takes no videos.
        switches: the template's variables that switch thinking on.
        rendering: returns the `Rendering` for messages with placeholders (as JSON) and for whether an answer
            contains a thought. It is cached, because finding it costs 0.2 ms.

    Raises:
        ModelError: the processor has no token for an image, or several templates and no default.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.image_token = image_token_of(processor)
        self.video_token = video_token_of(processor)
        template = template_source(processor, self.image_token)
        self.has_date = DATE_CALL.search(template) is not None
        self.source = DATE_CALL.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)
        self.switches = sorted(set(THINKING_SWITCH.findall(self.source)))
        self.rendering = lru_cache(maxsize=1024)(self._make_rendering)

    def apply(self, messages: list[Message], **options: bool) -> str:
        """Render messages that are in the template's form.

        Raises EncodeError if the template refuses them.
        """
        try:
            rendered: str = self.processor.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, **options
            )
        except (jinja2.TemplateError, *LIBRARY_ERRORS) as error:
            refusal = TemplateRefusalError if type(error) is jinja2.TemplateError else EncodeError
            raise refusal(f"the chat template refuses this conversation: {error}") from error
        return rendered

    def _make_rendering(self, with_placeholders: str, thought: bool) -> Rendering:
        """The `Rendering` of conversations like the given one.

        Args:
            with_placeholders: messages with placeholders as texts, as JSON.
            thought: whether an answer contains a thought.
        """
        messages = json.loads(with_placeholders)
        rewrite = self.rewrite_for(messages)
        renderings = [self._with_options(messages, rewrite, options) for options in self._options(thought)]
        # The first one that agrees; else the last one, in which thinking is switched off.
        return next((rendering for rendering in renderings if rendering.agrees), renderings[-1])

    def _options(self, thought: bool) -> list[Options]:
        if not self.switches:
            return [{}]
        switched = dict.fromkeys(self.switches, thought)
        return [switched] if thought else [{}, switched]

    def rewrite_for(self, messages: Sequence[Message]) -> MessageRewrite:
        """The first rewrite with which the template renders every part of the messages."""
        errors: list[EncodeError] = []
        rewrites: list[MessageRewrite] = [as_parts, text_as_strings]
        if not count_parts(messages, "video"):
            rewrites.append(all_as_strings)
        for rewrite in rewrites:
            try:
                self.literals(messages, rewrite)
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
        literals = self.literals(messages, rewrite, **options)
        if messages[-1]["role"] != "assistant":
            return Rendering(rewrite, options, literals, literals, "", agrees=True)
        prompt = self.literals(messages[:-1], rewrite, add_generation_prompt=True, **options)
        last = len(prompt) - 1  # texts before the last answer
        finished_literal, prompt_literal = literals[last], prompt[last]
        if literals[:last] == prompt[:last] and finished_literal.startswith(prompt_literal):
            unprompted = finished_literal.removeprefix(prompt_literal)
            agrees = not unprompted.strip()
            if not agrees and self.literals(messages[:-1], rewrite, **options)[-1] == prompt_literal:
                unprompted = ""  # the template has no generation prompt; the serving program writes the role
            return Rendering(rewrite, options, literals, literals, unprompted, agrees=agrees)
        return Rendering(rewrite, options, literals, [*prompt, *literals[last + 1 :]], "", agrees=False)

    def literals(
        self,
        messages: Sequence[Message],
        rewrite: MessageRewrite,
        **options: bool,
    ) -> list[str]:
        """The template's text before, between and after the placeholders in the messages."""
        rendered = self.apply(rewrite(messages, self.image_token), **options)
        literals = PLACEHOLDER.split(rendered)
        placeholders = [part["text"] for _, part in text_parts(messages)]
        if [f"vlmtune{number}text" for number in literals[1::2]] != placeholders:
            raise EncodeError(
                "the chat template leaves out or reorders parts of this conversation "
                "(a role that it does not know?)"
            )
        images, videos = (count_parts(messages, kind) for kind in ("image", "video"))
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
