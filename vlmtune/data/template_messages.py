"""Rewrites conversations into the forms that chat templates understand."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]
# Messages and the model's image token → the messages in the form that a template understands.
MessageRewrite = Callable[[Sequence[Message], str], list[Message]]


def text_parts(messages: Sequence[Message]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the turn, part) for each text part."""
    for turn, message in enumerate(messages):
        for part in message["content"]:
            if part["type"] == "text":
                yield turn, part


def with_placeholders(messages: Sequence[Message]) -> list[Message]:
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


def as_parts(messages: Sequence[Message], image_token: str) -> list[Message]:
    """The messages unchanged: every content is a list of typed parts."""
    return list(messages)


def text_as_strings(messages: Sequence[Message], image_token: str) -> list[Message]:
    """Messages without an image or video have strings as content, as Llama's system turn needs it."""
    return [
        message
        if any(part["type"] != "text" for part in message["content"])
        else {"role": message["role"], "content": "\n".join(part["text"] for part in message["content"])}
        for message in messages
    ]


def all_as_strings(messages: Sequence[Message], image_token: str) -> list[Message]:
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


def count_parts(messages: Sequence[Message], kind: str) -> int:
    """Number of parts of a kind in the messages."""
    return sum(part["type"] == kind for message in messages for part in message["content"])
