"""A frames folder: frames/*.jpg, dialogues in messages.txt, and labels.csv for {column} placeholders."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pyarrow import fs

from vlmtune.data.image_paths import RowError
from vlmtune.data.records import IMAGE_MARK, RawRow, check_order
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join

IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "frame", "path", "id")
SUFFIXES = (".jpg", ".jpeg", ".png")
SPEAKERS = {
    "user": "user",
    "사용자": "user",
    "assistant": "assistant",
    "어시스턴트": "assistant",
    "system": "system",
    "시스템": "system",
}
TURN = re.compile(rf"\s*({'|'.join(SPEAKERS)})\s*[:\uff1a]\s*(.*)", re.IGNORECASE)
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

# The fields of Line and Frame are part of the prepared store's key: see `source.fingerprint`.


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


@dataclass(frozen=True)
class Frame:
    """A frame with its label row; or, where `error` is set, a label row without a frame.

    Attributes:
        source: the place of the frame or the label row, for people.
        version: size in bytes and time of the last change, so that a changed frame changes the piece.
        labels: the label row as {column: value}; None if the frame has none.
    """

    source: str
    name: str = ""
    version: str = ""
    labels: dict[str, str] | None = None
    error: str | None = None


def scan_frames(folder: str, shown: str, group_by: str | None) -> tuple[tuple[Dialogue, ...], list[Frame]]:
    """The dialogues of a frames folder and its frames in name order, then its label rows without a frame.

    Args:
        folder: an absolute path or URI.
        shown: what messages call the folder.

    Raises:
        DataError: no frame can be used, because a file is missing or cannot be read, there is no dialogue,
            or labels.csv lacks a column that a placeholder or `group_by` names.
    """
    frames = _list_frames(folder, shown)
    messages = f"{shown}/messages.txt"
    dialogues = parse_dialogues(_read_text(join(folder, "messages.txt"), messages), messages)
    placeholders = [(column, line) for dialogue in dialogues for line in dialogue for column in line.columns]
    labels = f"{shown}/labels.csv"
    if not _exists(join(folder, "labels.csv")):
        if placeholders:
            column, line = placeholders[0]
            raise DataError(
                f"{messages}:{line.number} uses {{{column}}}, but there is no {labels}: "
                f"add it, with a column {column!r}"
            )
        if group_by:
            raise DataError(f"--group_by {group_by}: there is no {labels} to hold this column")
        return dialogues, frames
    columns, rows = _read_table(_read_text(join(folder, "labels.csv"), labels), labels)
    for column, line in placeholders:
        if column not in columns:
            raise DataError(
                f"{messages}:{line.number}: labels.csv has no column {column!r} for {{{column}}}; "
                f"it has: {', '.join(columns)}"
            )
    if group_by and group_by not in columns:
        raise DataError(f"--group_by {group_by}: {labels} has no such column; it has: {', '.join(columns)}")
    return dialogues, _match(frames, columns, rows, shown)


def frame_rows(frames: Sequence[Frame], dialogues: Sequence[Dialogue]) -> Iterator[RawRow]:
    """A row for each frame and dialogue, in that order.

    A frame or label row that cannot be used gives one row with the reason.
    """
    for frame in frames:
        if frame.error:
            yield RawRow(frame.source, error=frame.error)
            continue
        usable = [
            number
            for number, dialogue in enumerate(dialogues)
            if frame.labels is not None or not any(line.columns for line in dialogue)
        ]
        for number in usable:
            source = frame.source if len(dialogues) == 1 else f"{frame.source} (dialogue {number + 1})"
            yield _fill(dialogues[number], frame, source)
        if len(usable) < len(dialogues):
            reason = "the frame has no row in labels.csv: add one, or take the frame away"
            yield RawRow(frame.source, error=reason)


def parse_dialogues(text: str, shown: str) -> tuple[Dialogue, ...]:
    """The dialogues of a messages.txt.

    A turn begins with `USER:`, `ASSISTANT:` or `SYSTEM:`, goes on over the next lines, and a blank line ends
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
            raise DataError(f"{shown}:{number}: text outside a turn; begin the line with USER: or ASSISTANT:")
    if not dialogues[0]:
        raise DataError(
            f"{shown} holds no dialogue: write a line that begins USER: and one that begins ASSISTANT:"
        )
    return tuple(_check_dialogue(turns, shown) for turns in dialogues if turns)


def _check_dialogue(turns: list[tuple[str, str, int]], shown: str) -> Dialogue:
    first_line = f"{shown}:{turns[0][2]}"
    try:
        check_order([(f"{shown}:{number}", role) for role, _, number in turns])
    except RowError as error:
        message = str(error)
        raise DataError(message if message.startswith(shown) else f"{first_line}: {message}") from error
    if (marks := sum(text.count(IMAGE_MARK) for _, text, _ in turns)) > 1:
        raise DataError(f"{first_line}: the dialogue has {marks} {IMAGE_MARK} marks; a frame is one image")
    for role, text, number in turns:
        if not text:
            raise DataError(f"{shown}:{number}: the {role} turn is empty")
        if role != "user" and IMAGE_MARK in text:
            raise DataError(f"{shown}:{number}: only a user turn may hold an {IMAGE_MARK} mark")
    return tuple(
        Line(role, text, number, _columns(text, f"{shown}:{number}")) for role, text, number in turns
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


def _fill(dialogue: Dialogue, frame: Frame, source: str) -> RawRow:
    """The dialogue with the frame's labels in place of its placeholders."""
    labels = frame.labels or {}
    empty = next((column for line in dialogue for column in line.columns if not labels[column]), None)
    if empty is not None:
        return RawRow(source, error=f"column {empty!r} of labels.csv is empty for this frame: fill it in")

    def value(match: re.Match[str]) -> str:
        return match.group()[0] if match.group(1) is None else labels[match.group(1).strip()]

    turns = [{"role": line.role, "content": PLACEHOLDER.sub(value, line.text)} for line in dialogue]
    return RawRow(source, {"messages": turns, "image": f"frames/{frame.name}"}, group_fields=labels)


def _match(
    frames: list[Frame], columns: list[str], rows: list[tuple[int, list[str]]], shown: str
) -> list[Frame]:
    """Each frame with its label row; then an erroneous Frame for each label row that fits no single frame.

    Args:
        rows: (line number, values) of the label rows.
    """
    lower = {column.lower(): number for number, column in reversed(list(enumerate(columns)))}
    key = next((lower[name] for name in IMAGE_COLUMNS if name in lower), None)
    if key is None:
        raise DataError(
            f"{shown}/labels.csv names no image: it needs a column {', '.join(IMAGE_COLUMNS)}; "
            f"it has: {', '.join(columns)}"
        )
    names_by_key = _index([frame.name for frame in frames])
    labels: dict[str, tuple[int, dict[str, str]]] = {}
    bad = []
    for line, row in rows:
        source = f"{shown}/labels.csv:{line}"
        if len(row) != len(columns):
            reason = (
                f"{len(row)} fields where the header has {len(columns)}: put quotes round text with commas"
            )
            bad.append(Frame(source, error=reason))
            continue
        names = _find(names_by_key, row[key])
        if not names:
            reason = f"{columns[key]} {row[key]!r} has no frame in {shown}/frames"
            bad.append(Frame(source, error=reason))
        elif len(names) > 1:
            several = f"fits {len(names)} frames ({', '.join(names[:3])}): name the file"
            bad.append(Frame(source, error=f"{columns[key]} {row[key]!r} {several}"))
        elif names[0] in labels:
            reason = f"frame {names[0]} has a row already, on line {labels[names[0]][0]}: keep one"
            bad.append(Frame(source, error=reason))
        else:
            labels[names[0]] = (line, dict(zip(columns, row, strict=True)))
    matched = [
        replace(frame, labels=labels[frame.name][1]) if frame.name in labels else frame for frame in frames
    ]
    return matched + bad


def _index(names: list[str]) -> Mapping[str | int, list[str]]:
    """Frame names by name, by name without extension, and by the last number in the name."""
    index: dict[str | int, list[str]] = defaultdict(list)
    for name in names:
        stem = name.rpartition(".")[0]
        numbers = re.findall(r"[0-9]+", stem)
        index[name].append(name)
        index[stem].append(name)
        if numbers:
            index[int(numbers[-1])].append(name)
    return index


def _find(names_by_key: Mapping[str | int, list[str]], value: str) -> list[str]:
    name = value.replace("\\", "/").removeprefix("./").removeprefix("frames/")
    number = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else name
    return names_by_key.get(name) or names_by_key.get(number) or []


def _read_table(text: str, shown: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV text, and (line number, values) of its rows. Separators: comma, semicolon, tab."""
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    rows, line = [], 1
    try:
        for row in reader:
            if any(value.strip() for value in row):
                rows.append((line, [value.strip() for value in row]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{shown}:{line}: not CSV: {error}; look for a quote that is not closed") from error
    if not rows:
        raise DataError(f"{shown} is empty: it needs a header line and a line for each frame")
    columns = rows[0][1]
    doubled = next((column for column in columns if columns.count(column) > 1), None)
    if doubled is not None:
        raise DataError(f"{shown}:{rows[0][0]}: two columns are called {doubled!r}: rename one")
    return columns, rows[1:]


def _list_frames(folder: str, shown: str) -> list[Frame]:
    system, path = filesystem(join(folder, "frames"))
    inside = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    files = {info.base_name: info for info in inside if info.type == fs.FileType.File}
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
    if not names:
        raise DataError(
            f"{shown}/frames holds no image that ends in {', '.join(SUFFIXES)} (files there: {len(files)})"
        )
    return [
        Frame(f"{shown}/frames/{name}", name, f"{files[name].size} {files[name].mtime_ns}") for name in names
    ]


def _exists(path: str) -> bool:
    system, inner = filesystem(path)
    return bool(system.get_file_info(inner).type == fs.FileType.File)


def _read_text(path: str, shown: str) -> str:
    system, inner = filesystem(path)
    with system.open_input_file(inner) as file:
        content = file.read()
    try:
        return str(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{shown}:{line}: not UTF-8: save the file as UTF-8 (in Excel: CSV UTF-8)") from error
