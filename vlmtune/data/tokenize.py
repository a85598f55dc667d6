"""Conversation → token ids, segments and pixels, through the model's own processor and chat template.

Where the template ends and a person's text begins is found by rendering the conversation twice: once with a
mark in place of each
text, which shows the template's own pieces, and once as it is, which proves that the template only put the
texts in. So the loss mask is
right for every template, with or without `{% generation %}` marks.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import jinja2
import numpy as np
from PIL import Image

# Kinds of token, in `EncodedExample.kinds`.
TEMPLATE, IMAGE, TEXT, ANSWER = 0, 1, 2, 3
IGNORED = -100  # the label that torch's and transformers' losses leave out

# Tensors of a processor that run along the tokens (dimension 1 after the batch's) and must be cut with them.
SEQUENCE_TENSORS = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")

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
    """A conversation that this model's template or tokenizer cannot take; the message is the reason for a
    bad row."""


@dataclass
class EncodedExample:
    """One conversation, ready for the model but not yet cut to a length.

    Attributes:
        input_ids: `[T]` int32, image placeholders included.
        kinds: `[T]` uint8, what each token is: TEMPLATE, IMAGE, TEXT or ANSWER. Loss is on ANSWER.
        tensors: what else the model takes, as its processor gives it for a batch of one row: `pixel_values`
        (uint8 where the store holds
            resized pixels), image sizes and masks, and SEQUENCE_TENSORS of shape `[1, T, ...]`. Empty for
            text-only rows of most models.
    """

    input_ids: np.ndarray
    kinds: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """`[T]` int64, the token's id where it is trained on, else IGNORED."""
        labels = self.input_ids.astype(np.int64)
        labels[self.kinds != ANSWER] = IGNORED
        return labels

    @property
    def image_tokens(self) -> int:
        return int((self.kinds == IMAGE).sum())

    def take(self, kept: np.ndarray) -> "EncodedExample":
        """The tokens at `kept` (rising positions), with every tensor that runs along them."""
        tensors = {
            name: value[:, kept] if name in SEQUENCE_TENSORS else value
            for name, value in self.tensors.items()
        }
        return EncodedExample(self.input_ids[kept], self.kinds[kept], tensors)

    def prompt(self) -> "EncodedExample":
        """What comes before the last answer: what the model is given to generate that answer."""
        answers = np.flatnonzero(self.kinds == ANSWER)
        breaks = np.flatnonzero(np.diff(answers) > 1)
        start = answers[breaks[-1] + 1] if len(breaks) else answers[0]
        return self.take(np.arange(start))


def required_length(example: EncodedExample) -> int:
    """The smallest `max_length` that holds the row's images, the template around them and one trained
    token."""
    first = int(np.argmax(example.kinds == ANSWER))
    return int((_protected(example.kinds, first)).sum()) + 1


def shorten(example: EncodedExample, max_length: int | None) -> EncodedExample:
    """Cut text, never image tokens, so that at most `max_length` tokens remain.

    Kept: every image token and the template before the first answer; then the start of the first answer, up
    to half of what is left or
    more where the question is short; then the end of the question, nearest to the answer; then whole what
    follows, as far as it goes.

    Raises:
        ValueError: if `max_length` is below `required_length(example)`.
    """
    length = len(example.input_ids)
    if max_length is None or length <= max_length:
        return example
    if max_length < required_length(example):
        raise ValueError(
            f"max_length {max_length} cannot hold this row: its images and template alone need {required_length(example)}"
        )
    first = int(np.argmax(example.kinds == ANSWER))
    keep = _protected(example.kinds, first)
    budget = max_length - int(keep.sum())
    question = np.flatnonzero(~keep[:first])
    later = first + np.flatnonzero(~keep[first:])
    breaks = np.flatnonzero(example.kinds[first:] != ANSWER)
    answer = int(breaks[0]) if len(breaks) else length - first
    from_answer = min(answer, max(budget - len(question), budget // 2, 1))
    from_question = min(len(question), budget - from_answer)
    keep[question[len(question) - from_question :]] = True
    keep[later[: budget - from_question]] = True
    return example.take(np.flatnonzero(keep))


def _protected(kinds: np.ndarray, first_answer: int) -> np.ndarray:
    """`[T]` bool: tokens that are never cut."""
    positions = np.arange(len(kinds))
    protected: np.ndarray = (kinds == IMAGE) | ((kinds == TEMPLATE) & (positions < first_answer))
    return protected


class RowEncoder:
    """Turns conversations into Examples with one model's processor.

    Args:
        processor: a transformers processor with a tokenizer, and an image processor where the model has eyes.
        raw_pixels: keep `pixel_values` as resized uint8, to be normalised on the device (see
        `collate.PixelFormat`).
    """

    def __init__(self, processor: Any, *, raw_pixels: bool = False) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.chat_template = processor.chat_template or self.tokenizer.chat_template or BUILTIN_TEMPLATE
        self.raw_pixels = raw_pixels
        self.image_token_id = processor.image_token_id
        # Conversations of one shape have one outline; rendering one costs 0.2 ms.
        self._outline = lru_cache(maxsize=1024)(lambda marked: self._apply(json.loads(marked)))
        # The named ones are not all: Llama's headers and Idefics' tile marks are special by their entry in
        # the vocabulary alone.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=lambda token: (-len(token), token)))
        )

    def encode(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> EncodedExample:
        """Tokenise one conversation whose content is typed parts, with its images in the order of the image
        parts.

        Raises:
            EncodeError: where the texts hold the model's special tokens, or the template changes or leaves
            out a text.
        """
        text, spans = self._render(messages)
        options = {"do_rescale": False, "do_normalize": False} if images and self.raw_pixels else {}
        given = {"images": list(images)} if images else {}
        features = self.processor(
            text=[text],
            **given,
            **options,
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
        """The conversation as the text that the processor is given."""
        return self._render(messages)[0]

    def _kinds(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        spans: list[tuple[int, int, int]],
        replaced: list[dict[str, Any]],
    ) -> np.ndarray:
        """What each token is, from where its characters lie. `spans` are (kind, start, end) before images
        were expanded."""
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
        """The conversation's text up to the end of its last answer, and (kind, start, end) of every text in
        it, in characters."""
        texts = [
            (turn, part["text"])
            for turn, message in enumerate(messages)
            for part in message["content"]
            if part["type"] == "text"
        ]
        for _, text in texts:
            if found := self._special.search(text):
                raise EncodeError(
                    f"the text contains {found.group()!r}, a special token of this model: remove it"
                )
        marked = self._outline(json.dumps(_marked(messages)))
        pieces = re.split(r"vlmtune(\d+)text", marked)
        if [int(number) for number in pieces[1::2]] != list(range(len(texts))):
            raise EncodeError(
                "the chat template leaves out or reorders parts of this conversation (a role that it does not know?)"
            )
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marked.count(self.processor.image_token) != images or "'type': 'text'" in marked:
            raise EncodeError(
                "the chat template is one for text alone: it shows content of typed parts, or its images, wrongly"
            )
        whole = self._apply(messages)
        for prepare in (str, str.strip):  # Llama's templates strip each text
            filled = [prepare(text) for _, text in texts]
            if whole == _join(pieces, filled):
                break
        else:
            raise EncodeError(
                "the chat template rewrites the text of this conversation, so that its answers cannot be told apart"
            )
        return self._assemble(pieces[0::2], [(turn, messages[turn]["role"]) for turn, _ in texts], filled)

    def _assemble(
        self, template: list[str], turns: list[tuple[int, str]], texts: list[str]
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """Join template and texts, closing each answer with an end token where the template has none.

        `turns`: (number, role) of the turn that each text belongs to.
        """
        out, spans, end_of_answers = template[0], [], 0
        if self._needs_bos(out):
            out = self.tokenizer.bos_token + out
        for turn, following, text, after in zip(turns, [*turns[1:], None], texts, template[1:], strict=True):
            _, role = turn
            start = len(out) - (self._unprompted(out) if role == "assistant" else 0)
            out += text
            if (
                role == "assistant" and turn == following
            ):  # what stands between two texts of one answer is part of it
                out, after = out + after, ""
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
        """Mllama's processor puts a missing BOS into the text itself, which would shift every offset: put it
        there before."""
        return bool(vars(self.processor).get("bos_token")) and not self._starts_with_bos(first_piece)

    def _unprompted(self, before: str) -> int:
        """How much white space before an answer is not in the generation prompt, so that the model has to
        write it: part of the answer."""
        written = before.rstrip()
        opening = self._opening
        if not opening.strip() or not written.endswith(opening.rstrip()):
            return 0
        return max(0, len(before) - len(written) - (len(opening) - len(opening.rstrip())))

    @cached_property
    def _opening(self) -> str:
        """What the template puts before an answer that is to be generated."""
        question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        return self._apply(question, add_generation_prompt=True).removeprefix(self._apply(question))

    def _closing(self, after: str) -> int | None:
        """How much of the template's text behind an answer closes it: white space and one special token, or
        None."""
        found = self._special.match(after, len(after) - len(after.lstrip()))
        return None if found is None or found.group() == self.processor.image_token else found.end()

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
    """PixelFormat that a processor returned as floats although it was told neither to rescale nor to normalise."""
    if pixels.dtype == np.uint8:
        return pixels
    raw = pixels.astype(np.uint8)
    if not np.array_equal(raw, pixels):
        raise ValueError("this processor's resized pixels are not whole numbers from 0 to 255")
    return raw
