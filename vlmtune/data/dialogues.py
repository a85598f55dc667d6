"""messages.txt of a frames folder: dialogues with placeholders for columns of labels.csv."""

import re
from dataclasses import dataclass

from vlmtune.data.image_paths import RowError
from vlmtune.data.marks import IMAGE_MARK
from vlmtune.data.turns import check_order
from vlmtune.errors import DataError

SPEAKERS = {
    "user": "user",
    "사용자": "user",
    "assistant": "assistant",
    "어시스턴트": "assistant",
    "system": "system",
    "시스템": "system",
}
WORDS = "USER: and ASSISTANT: (or 사용자: and 어시스턴트:)"
TURN = re.compile(rf"\s*({'|'.join(SPEAKERS)})\s*[:\uff1a]\s*(.*)", re.IGNORECASE)
ANSWER_IN_LINE = re.compile(r"\b(ASSISTANT|Assistant|어시스턴트)\s*[:\uff1a]")
OTHER_SPEAKER = re.compile(r"\s*(\w{1,12})\s*[:\uff1a]")  # of a line that begins no turn
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
NOT_IN_NAMES = re.compile(r"[\"':,\[\]\n]")  # JSON between braces holds these; names of columns do not

# The fields of Line are part of the prepared store's key: see `source.fingerprint`.


@dataclass(frozen=True)
class Line:
    """A turn of a dialogue as messages.txt has it.

    Attributes:
        number: the line of the file that it begins on.
        columns: the columns of labels.csv that its placeholders name.
    """

    role: str
    text: str
    number: int
    columns: tuple[str, ...]


Dialogue = tuple[Line, ...]


def parse_dialogues(text: str, shown_path: str) -> tuple[Dialogue, ...]:
    """The dialogues of a messages.txt.

    A turn begins with `USER:`, `ASSISTANT:` or `SYSTEM:`, continues on the next lines, and a blank line ends
    its dialogue.

    Raises:
        DataError: text outside a turn, turns in no sensible order, stray braces, or no dialogue at all.
    """
    dialogues: list[list[tuple[str, str, int]]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        opening = TURN.match(line)
        if opening:
            dialogues[-1].append((SPEAKERS[opening.group(1).lower()], opening.group(2).strip(), number))
        elif not line.strip():
            dialogues += [[]] if dialogues[-1] else []
        elif dialogues[-1]:
            role, before, first_line = dialogues[-1][-1]
            dialogues[-1][-1] = (role, f"{before}\n{line.strip()}".strip(), first_line)
        else:
            raise DataError(f"{shown_path}:{number}: text outside a turn; a turn begins with {WORDS}")
    if not dialogues[0]:
        raise DataError(
            f"{shown_path} holds no dialogue: write a line that begins USER: and one that begins ASSISTANT:"
        )
    return tuple(_check_dialogue(turns, shown_path) for turns in dialogues if turns)


def check_columns(dialogues: tuple[Dialogue, ...], columns: list[str] | None, messages: str) -> None:
    """Check that labels.csv has a column for each placeholder.

    Args:
        columns: None if there is no labels.csv.
        messages: the path of messages.txt, as messages show it.

    Raises:
        DataError: a placeholder has no column.
    """
    for line in (line for dialogue in dialogues for line in dialogue):
        for column in line.columns:
            if columns is not None and column in columns:
                continue
            place = f"{messages}:{line.number}"
            if NOT_IN_NAMES.search(column):
                raise DataError(
                    f"{place}: {{{column}}} names no column of labels.csv; "
                    "write {{ and }} for braces that stay as they are"
                )
            if columns is None:
                raise DataError(
                    f"{place} uses {{{column}}}, but there is no {messages.removesuffix('messages.txt')}"
                    f"labels.csv: add it, with a column {column!r}"
                )
            raise DataError(
                f"{place}: labels.csv has no column {column!r} for {{{column}}}; it has: {', '.join(columns)}"
            )


def fill(dialogue: Dialogue, labels: dict[str, str]) -> list[dict[str, str]]:
    """The turns of a dialogue, with the labels of a frame in place of the placeholders."""

    def value(match: re.Match[str]) -> str:
        return match.group()[0] if match.group(1) is None else labels[match.group(1).strip()]

    return [{"role": line.role, "content": PLACEHOLDER.sub(value, line.text)} for line in dialogue]


def _check_dialogue(turns: list[tuple[str, str, int]], shown_path: str) -> Dialogue:
    first_line = f"{shown_path}:{turns[0][2]}"
    if turns[-1][0] == "user":
        _check_answer(turns[-1], shown_path)
    try:
        check_order([(f"{shown_path}:{number}", role) for role, _, number in turns])
    except RowError as error:
        message = str(error)
        raise DataError(message if message.startswith(shown_path) else f"{first_line}: {message}") from error
    if (marks := sum(text.count(IMAGE_MARK) for _, text, _ in turns)) > 1:
        raise DataError(f"{first_line}: the dialogue has {marks} {IMAGE_MARK} marks; a frame is one image")
    for role, text, number in turns:
        if not text:
            raise DataError(f"{shown_path}:{number}: the {role} turn is empty")
        if role != "user" and IMAGE_MARK in text:
            raise DataError(f"{shown_path}:{number}: only a user turn may hold an {IMAGE_MARK} mark")
    return tuple(
        Line(role, text, number, _columns(text, f"{shown_path}:{number}")) for role, text, number in turns
    )


def _check_answer(turn: tuple[str, str, int], shown_path: str) -> None:
    """Raises DataError if the last turn is the user's but contains what is meant as the answer."""
    _, text, number = turn
    for offset, line in enumerate(text.split("\n")):
        if ANSWER_IN_LINE.search(line):
            raise DataError(
                f"{shown_path}:{number + offset}: ASSISTANT: stands in the middle of a line; begin a line "
                "with it"
            )
        if offset and (other := OTHER_SPEAKER.match(line)):
            raise DataError(
                f"{shown_path}:{number + offset}: {other.group().strip()} begins no turn; a turn of the "
                "assistant "
                "begins with ASSISTANT: (or 어시스턴트:)"
            )


def _columns(text: str, place: str) -> tuple[str, ...]:
    """The columns that the placeholders of a text name."""
    matches = [match for match in PLACEHOLDER.finditer(text) if match.group() not in ("{{", "}}")]
    for match in matches:
        if not (match.group(1) or "").strip():
            raise DataError(
                f"{place}: {match.group()!r} is no placeholder; "
                "write {{ and }} for braces that stay as they are"
            )
    return tuple(match.group(1).strip() for match in matches)
