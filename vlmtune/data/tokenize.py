"""Conversation → token ids, kinds of tokens and pixels, through the model's processor and chat template.

The loss mask needs to know where the template ends and a person's text begins. The conversation is rendered
twice: once with a mark in place of each text, which shows the template's own pieces, and once as it is, which
proves that the template only puts the texts in. So the mask is right for every template, with or without
`{% generation %}` marks.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vlmtune.data.encoded_example import ANSWER, IMAGE, TEMPLATE, TEXT, EncodedExample

# LLaVA-1.5's format, for models that ship no chat template: images first, then the text of a turn.
BUILTIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


class EncodeError(ValueError):
    """This model's template or tokenizer cannot take a conversation. The message is a bad row's reason."""


class RowEncoder:
    """Turns conversations into examples with one model's processor.

    Args:
        processor: a transformers processor with a tokenizer and an image processor.
        raw_pixels: keep `pixel_values` as resized uint8, to be normalised on the device (see
            `collate.PixelFormat`).
    """

    def __init__(self, processor: Any, *, raw_pixels: bool = False) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.chat_template = processor.chat_template or self.tokenizer.chat_template or BUILTIN_TEMPLATE
        self.raw_pixels = raw_pixels
        self.image_token_id = processor.image_token_id
        # Conversations of one shape render alike with marks; rendering one costs 0.2 ms.
        self._render_marked = lru_cache(maxsize=1024)(lambda marked: self._apply(json.loads(marked)))
        # `all_special_tokens` lacks some: Llama's headers and Idefics' tile marks are special by their entry
        # in the vocabulary alone.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=lambda token: (-len(token), token)))
        )

    def encode(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> EncodedExample:
        """Tokenize one conversation of typed parts, with its images in the order of the image parts.

        Raises:
            EncodeError: a text holds one of the model's special tokens, or the template changes or leaves
                out a text.
        """
        text, spans = self._render(messages)
        image_options: dict[str, Any] = {"images": list(images)} if images else {}
        if images and self.raw_pixels:
            image_options |= {"do_rescale": False, "do_normalize": False}
        features = self.processor(
            text=[text],
            **image_options,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            add_special_tokens=not self._starts_with_bos(text),
        )
        ids = np.asarray(features.pop("input_ids")[0], dtype=np.int32)
        offsets = np.asarray(features.pop("offset_mapping")[0], dtype=np.int64).reshape(-1, 2)
        replaced = (features.pop("text_replacement_offsets", None) or [[]])[0]
        features.pop("attention_mask", None)
        tensors = {name: np.asarray(value) for name, value in features.items()}
        if self.raw_pixels and "pixel_values" in tensors:
            tensors["pixel_values"] = _as_uint8(tensors["pixel_values"])
        return EncodedExample(ids, self._kinds(ids, offsets, spans, replaced), tensors)

    def chat_text(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the text that the processor gets."""
        return self._render(messages)[0]

    def _kinds(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        spans: list[tuple[int, int, int]],
        replaced: list[dict[str, Any]],
    ) -> np.ndarray:
        """What each token is, from the place of its characters in the text.

        Args:
            spans: (kind, start, end) in characters, before images were expanded.
            replaced: where the processor expanded images: their old and new span.
        """
        kinds = np.full(len(ids), TEMPLATE, dtype=np.uint8)
        for kind, start, end in spans:
            shift = sum(
                (r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0])
                for r in replaced
                if r["span"][1] <= start
            )
            kinds[_overlap(offsets, start + shift, end + shift)] = kind
        for image in replaced:
            kinds[_overlap(offsets, *image["new_span"])] = IMAGE
        kinds[ids == self.image_token_id] = IMAGE
        return kinds

    def _starts_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _render(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int, int]]]:
        """The conversation's text up to the end of its last answer, and the spans of its texts.

        A span is (kind, start, end) in characters.
        """
        texts = [
            (turn, part["text"])
            for turn, message in enumerate(messages)
            for part in message["content"]
            if part["type"] == "text"
        ]
        for _, text in texts:
            if match := self._special.search(text):
                raise EncodeError(
                    f"the text contains {match.group()!r}, a special token of this model: remove it"
                )
        marked = self._render_marked(json.dumps(_marked(messages)))
        pieces = re.split(r"vlmtune(\d+)text", marked)
        if [int(number) for number in pieces[1::2]] != list(range(len(texts))):
            raise EncodeError(
                "the chat template leaves out or reorders parts of this conversation "
                "(a role that it does not know?)"
            )
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marked.count(self.processor.image_token) != images or "'type': 'text'" in marked:
            raise EncodeError(
                "the chat template is one for text alone: "
                "it shows content of typed parts, or its images, wrongly"
            )
        rendered = self._apply(messages)
        for change in (str, str.strip):  # Llama's templates strip each text
            rendered_texts = [change(text) for _, text in texts]
            if rendered == _join(pieces, rendered_texts):
                break
        else:
            raise EncodeError(
                "the chat template rewrites the text of this conversation, "
                "so that its answers cannot be told apart"
            )
        turns = [(turn, messages[turn]["role"]) for turn, _ in texts]
        return self._assemble(pieces[0::2], turns, rendered_texts)

    def _assemble(
        self, template: list[str], turns: list[tuple[int, str]], texts: list[str]
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """Join template and texts, closing each answer with an end token where the template has none.

        Args:
            template: the template's pieces before, between and after the texts.
            turns: (number, role) of the turn that each text belongs to.
        """
        out, spans, end_of_answers = template[0], [], 0
        if self._needs_bos(out):
            out = self.tokenizer.bos_token + out
        for turn, following, text, after in zip(turns, [*turns[1:], None], texts, template[1:], strict=True):
            _, role = turn
            start = len(out) - (self._unprompted(out) if role == "assistant" else 0)
            out += text
            if role == "assistant" and turn == following:
                out, after = out + after, ""  # what is between two texts of one answer is part of it
            elif role == "assistant":
                closing = self._closing(after)
                if closing is None:
                    out += self.tokenizer.eos_token
                else:
                    out, after = out + after[:closing], after[closing:]
                end_of_answers = len(out)
            spans.append((ANSWER if role == "assistant" else TEXT, start, len(out)))
            out += after
        return (out[:end_of_answers] if end_of_answers else out), spans

    def _needs_bos(self, first_piece: str) -> bool:
        """Whether the text lacks a BOS that the processor would put into it, which shifts every offset.

        Mllama's processor does so.
        """
        return bool(vars(self.processor).get("bos_token")) and not self._starts_with_bos(first_piece)

    def _unprompted(self, before: str) -> int:
        """How many white-space characters before an answer are part of it.

        They are not in the generation prompt, so that the model has to write them.
        """
        written = before.rstrip()
        opening = self._opening
        if not opening.strip() or not written.endswith(opening.rstrip()):
            return 0
        return max(0, len(before) - len(written) - (len(opening) - len(opening.rstrip())))

    @cached_property
    def _opening(self) -> str:
        """The generation prompt: what the template puts before an answer."""
        question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        return self._apply(question, add_generation_prompt=True).removeprefix(self._apply(question))

    def _closing(self, after: str) -> int | None:
        """How many characters behind an answer close it: white space and one special token. None: none do."""
        match = self._special.match(after, len(after) - len(after.lstrip()))
        return None if match is None or match.group() == self.processor.image_token else match.end()

    def _apply(self, messages: Sequence[dict[str, Any]], **options: bool) -> str:
        try:
            rendered: str = self.processor.apply_chat_template(
                list(messages), chat_template=self.chat_template, tokenize=False, **options
            )
        except jinja2.TemplateError as error:
            raise EncodeError(f"the chat template refuses this conversation: {error}") from error
        return rendered


def _marked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with `vlmtune<n>text` in place of the n-th text."""
    numbers = count()
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": f"vlmtune{next(numbers)}text"} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _join(pieces: list[str], texts: list[str]) -> str:
    return pieces[0] + "".join(text + after for text, after in zip(texts, pieces[2::2], strict=True))


def _overlap(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """`[T]` bool: tokens with a character in `[start, end)`. `offsets` is `[T, 2]`."""
    return (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Resized pixels as uint8; some processors return them as floats.

    Raises:
        ValueError: they are not whole numbers from 0 to 255.
    """
    if pixels.dtype == np.uint8:
        return pixels
    raw = pixels.astype(np.uint8)
    if not np.array_equal(raw, pixels):
        raise ValueError("this processor's resized pixels are not whole numbers from 0 to 255")
    return raw
