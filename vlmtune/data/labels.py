"""Says which token is template, image, text or answer, and checks by decoding that the answers were found.

A processor changes the text before it is tokenized: it expands images, and may add a BOS token before it or
an end token after it. There are three ways to find the tokens of a span of characters. They are tried in
turn, and the first one whose answers decode to their text is used.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlmtune.data.chat_template import ChatText
from vlmtune.data.encoded_example import ANSWER, IMAGE, TEMPLATE

Spans = Sequence[tuple[int, int, int]]
# How many tokens next to an image may differ because they merged with the tokens of the image.
MAX_MERGED = 4


def token_kinds(
    tokenizer: Any,
    chat: ChatText,
    image_token: str,
    image_ids: Sequence[int],
    ids: np.ndarray,
    offsets: np.ndarray | None,
    image_replacements: Sequence[dict[str, Any]],
) -> tuple[np.ndarray, str | None]:
    """(the kind of each token, `[T]` uint8; what is wrong with the answers, None if they decode correctly).

    Args:
        image_token: the text that stands for an image in the rendered template.
        image_ids: the tokens of which the processor makes an image.
        offsets: `[T, 2]` characters of each token in the tokenized text, if the tokenizer returns them.
        image_replacements: the images that the processor expanded, as it reports them, with their span of
            characters before and after.
    """
    kinds, problem = np.full(len(ids), TEMPLATE, dtype=np.uint8), None
    for kinds in _candidate_kinds(tokenizer, chat, image_token, ids, offsets, image_replacements):
        kinds[np.isin(ids, image_ids)] = IMAGE
        problem = wrong_answer(tokenizer, chat, ids, kinds)
        if problem is None:
            break
    return kinds, problem


def wrong_answer(tokenizer: Any, chat: ChatText, ids: np.ndarray, kinds: np.ndarray) -> str | None:
    """The first answer that its labelled tokens do not decode to, in words; None if all decode correctly."""
    positions = np.flatnonzero(kinds == ANSWER)
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(positions) else []
    if len(runs) != len(chat.answers):
        return f"{len(chat.answers)} answers, but {len(runs)} labelled runs of tokens"
    for run, (start, end) in zip(runs, chat.answers, strict=True):
        tokens = ids[run].tolist()
        found, wanted = _letters(tokenizer, tokens), "".join(chat.text[start:end].split())
        same = found == wanted or found == _as_tokenized(tokenizer, chat.text[start:end])
        if same and not _lacks_space(tokenizer, tokens, chat.text[start:end]):
            continue
        # The first token may begin with characters of the template that it merged with.
        merged = found.removesuffix(wanted)
        before = "".join(chat.text[:start].split())
        if (
            found.endswith(wanted)
            and before.endswith(merged)
            and 0 < len(merged) < len(_letters(tokenizer, tokens[:1]))
        ):
            continue
        return f"labelled is {tokenizer.decode(tokens)!r}, and the answer is {chat.text[start:end]!r}"
    return None


def _lacks_space(tokenizer: Any, tokens: list[int], text: str) -> bool:
    """Whether a text begins with white space that its tokens lack.

    SentencePiece marks such a space in the first token, and drops it in decoding.
    """
    if text[:1].strip() or tokenizer.convert_ids_to_tokens(tokens[:1])[0].startswith("\u2581"):
        return False
    decoded: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return bool(decoded[:1].strip())


def _candidate_kinds(
    tokenizer: Any,
    chat: ChatText,
    image_token: str,
    ids: np.ndarray,
    offsets: np.ndarray | None,
    image_replacements: Sequence[dict[str, Any]],
) -> Iterator[np.ndarray]:
    """The kinds of the tokens as each of the three ways finds them."""
    if offsets is not None:
        yield _by_offsets(ids, offsets, chat.spans, image_replacements)
    if len(image_replacements) == chat.text.count(image_token):
        text, spans = _expanded(chat, image_token, [image["replacement"] for image in image_replacements])
        plain, kinds = _tokenized(tokenizer, text, spans)
        start = _last_match(ids, plain, len(ids))
        if start is not None:
            out = np.full(len(ids), TEMPLATE, dtype=np.uint8)
            out[start : start + len(plain)] = kinds
            yield out
    by_segments = _by_segments(tokenizer, chat, image_token, ids)
    if by_segments is not None:
        yield by_segments


def _by_offsets(
    ids: np.ndarray, offsets: np.ndarray, spans: Spans, image_replacements: Sequence[dict[str, Any]]
) -> np.ndarray:
    """By the characters of each token.

    Right if the processor changes nothing but the images that it reports.
    """
    kinds = np.full(len(ids), TEMPLATE, dtype=np.uint8)
    for kind, start, end in spans:
        shift = sum(
            (image["new_span"][1] - image["new_span"][0]) - (image["span"][1] - image["span"][0])
            for image in image_replacements
            if image["span"][1] <= start
        )
        kinds[_overlap(offsets, start + shift, end + shift)] = kind
    for image in image_replacements:
        kinds[_overlap(offsets, *image["new_span"])] = IMAGE
    return kinds


def _expanded(
    chat: ChatText, image_token: str, replacements: Sequence[str]
) -> tuple[str, list[tuple[int, int, int]]]:
    """The text with each image token replaced, and its spans with those of the images added."""
    parts = chat.text.split(image_token)
    out, shifts, images, old = parts[0], [(0, 0)], [], len(parts[0])
    for replacement, part in zip(replacements, parts[1:], strict=True):
        images.append((IMAGE, len(out), len(out) + len(replacement)))
        out += replacement
        old += len(image_token)
        shifts.append((old, len(out) - old))
        out, old = out + part, old + len(part)
    spans = []
    for kind, start, end in chat.spans:
        shift = next(by for at, by in reversed(shifts) if at <= start)
        spans.append((kind, start + shift, end + shift))
    return out, [*spans, *images]


def _by_segments(tokenizer: Any, chat: ChatText, image_token: str, ids: np.ndarray) -> np.ndarray | None:
    """By the tokens of the texts between images, which are searched from the end of the row.

    The tokens between the texts that were found belong to images. None if a text is not found.
    """
    plain, kinds = _tokenized(tokenizer, chat.text, [*chat.spans, *_image_spans(chat.text, image_token)])
    if chat.text.count(image_token) and not (kinds == IMAGE).any():
        return None
    out = np.full(len(ids), IMAGE, dtype=np.uint8)
    end = len(ids)
    cuts = np.flatnonzero(kinds == IMAGE).tolist()
    segments = list(zip([-1, *cuts], [*cuts, len(plain)], strict=True))
    for number, (before, after) in reversed(list(enumerate(segments))):
        segment, kind = plain[before + 1 : after], kinds[before + 1 : after]
        match = _match_segment(ids, segment, end, last=number == len(segments) - 1)
        if match is None:
            return None
        start, first, stop = match
        out[start : start + stop - first] = kind[first:stop]
        end = start
    out[:end] = TEMPLATE  # tokens that the processor added before the text
    tail = np.flatnonzero(np.isin(out, [ANSWER]))
    if len(tail):
        rest = out[tail[-1] + 1 :]
        rest[rest == IMAGE] = TEMPLATE  # tokens that it added after the text
    return out


def _match_segment(
    ids: np.ndarray, segment: np.ndarray, end: int, *, last: bool
) -> tuple[int, int, int] | None:
    """Find `segment[first:stop]` before `end`; up to MAX_MERGED tokens at its sides may have merged.

    Returns:
        (position in ids, first, stop); None if it is not found.
    """
    if not len(segment):
        return end, 0, 0
    for dropped in range(MAX_MERGED + 1):
        for first in range(dropped + 1):
            stop = len(segment) - (dropped - first)
            if first >= stop or (last and stop < len(segment)):
                continue
            start = _last_match(ids, segment[first:stop], end)
            if start is not None:
                return start, first, stop
    return (end, 0, 0) if len(segment) <= MAX_MERGED and not last else None


def _last_match(ids: np.ndarray, wanted: np.ndarray, end: int) -> int | None:
    """The last position of `wanted` in `ids` that ends before `end`."""
    last = end - len(wanted)
    if last < 0:
        return None
    if not len(wanted):
        return end
    starts = np.flatnonzero(ids[: last + 1] == wanted[0])
    return next(
        (int(start) for start in starts[::-1] if np.array_equal(ids[start : start + len(wanted)], wanted)),
        None,
    )


def _tokenized(tokenizer: Any, text: str, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text that is tokenized alone, `[T]`, and their kinds."""
    if tokenizer.is_fast:
        features = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(features["input_ids"])
        offsets = np.asarray(features["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        kinds = np.full(len(ids), TEMPLATE, dtype=np.uint8)
        for kind, start, end in spans:
            kinds[_overlap(offsets, start, end)] = kind
        return ids, kinds
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
    kinds = np.full(len(ids), TEMPLATE, dtype=np.uint8)
    for kind, start, end in spans:
        first, stop = (_tokens_before(tokenizer, text, position, ids) for position in (start, end))
        kinds[first:stop] = kind
    return ids, kinds


def _tokens_before(tokenizer: Any, text: str, position: int, ids: np.ndarray) -> int:
    """How many tokens lie before a character of the text, for a tokenizer that returns no offsets."""
    part = np.asarray(tokenizer(text[:position], add_special_tokens=False)["input_ids"])[: len(ids)]
    different = np.flatnonzero(part != ids[: len(part)])
    return int(different[0]) if len(different) else len(part)


def _image_spans(text: str, token: str) -> list[tuple[int, int, int]]:
    """(IMAGE, start, end) of each image token in a text."""
    spans, position = [], text.find(token)
    while position >= 0:
        spans.append((IMAGE, position, position + len(token)))
        position = text.find(token, position + len(token))
    return spans


def _letters(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return "".join(text.split())


def _as_tokenized(tokenizer: Any, text: str) -> str:
    """A text after encoding and decoding, which may change its letters; without white space."""
    return _letters(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _overlap(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """`[T]` bool: tokens with a character in `[start, end)`. `offsets` is `[T, 2]`."""
    return (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
