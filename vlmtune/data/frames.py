"""A frames folder: frames/*.jpg, dialogues of messages.txt, and labels.csv that fills their `{column}`
placeholders."""

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


@dataclass(frozen=True)
class Line:
    """A turn of a dialogue as written in messages.txt. `number`: the line that it begins on; `columns`: what
    it needs of labels.csv."""

    role: str
    text: str
    number: int
    columns: tuple[str, ...]


Dialogue = tuple[Line, ...]


@dataclass(frozen=True)
class Frame:
    """A frame with its label row (None: it has none), or, where `error` says so, a label row that has no
    frame.

    `version`: size in bytes and time of change, so that a changed frame makes another piece.
    """

    source: str
    name: str = ""
    version: str = ""
    labels: dict[str, str] | None = None
    error: str | None = None


def scan_frames(folder: str, shown: str, group_by: str | None) -> tuple[tuple[Dialogue, ...], list[Frame]]:
    """The dialogues and all frames of `folder` (an absolute path or URI, called `shown` in messages), in
    name order; bad label rows last.

    Raises DataError where no frame could be used: a file that is missing or cannot be read, no dialogue, a
    placeholder without its column.
    """
    frames = _list_frames(folder, shown)
    dialogues = parse_dialogues(
        _read_text(join(folder, "messages.txt"), f"{shown}/messages.txt"), f"{shown}/messages.txt"
    )
    labels_name = f"{shown}/labels.csv"
    needed = [(column, line) for dialogue in dialogues for line in dialogue for column in line.columns]
    if not _exists(join(folder, "labels.csv")):
        if needed:
            column, line = needed[0]
            raise DataError(
                f"{shown}/messages.txt:{line.number} uses {{{column}}}, but there is no {labels_name}: add it, with a column {column!r}"
            )
        if group_by:
            raise DataError(f"--group_by {group_by}: there is no {labels_name} to hold this column")
        return dialogues, frames
    columns, rows = _read_table(_read_text(join(folder, "labels.csv"), labels_name), labels_name)
    for column, line in needed:
        if column not in columns:
            raise DataError(
                f"{shown}/messages.txt:{line.number}: labels.csv has no column {column!r} for {{{column}}}; it has: {', '.join(columns)}"
            )
    if group_by and group_by not in columns:
        raise DataError(
            f"--group_by {group_by}: {labels_name} has no such column; it has: {', '.join(columns)}"
        )
    return dialogues, _match(frames, columns, rows, shown)


def frame_conversations(frames: Sequence[Frame], dialogues: Sequence[Dialogue]) -> Iterator[RawRow]:
    """A record for each frame and dialogue, in that order; one with an error for a frame or label row that
    cannot be used."""
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
            yield RawRow(
                frame.source, error="the frame has no row in labels.csv: add one, or take the frame away"
            )


def parse_dialogues(text: str, shown: str) -> tuple[Dialogue, ...]:
    """The dialogues of a messages.txt: turns begin `USER:`, `ASSISTANT:` or `SYSTEM:`, go on over the next
    lines, and end at a blank line.

    Raises DataError, with the line, for text outside a turn, turns in no sensible order, stray braces, and a
    file without a dialogue.
    """
    dialogues: list[list[tuple[str, str, int]]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        found = TURN.match(line)
        if found:
            dialogues[-1].append((SPEAKERS[found.group(1).lower()], found.group(2).strip(), number))
        elif not line.strip():
            dialogues += [[]] if dialogues[-1] else []
        elif dialogues[-1]:
            role, before, begun = dialogues[-1][-1]
            dialogues[-1][-1] = (role, f"{before}\n{line.strip()}".strip(), begun)
        else:
            raise DataError(f"{shown}:{number}: text outside a turn; begin the line with USER: or ASSISTANT:")
    if not dialogues[0]:
        raise DataError(
            f"{shown} holds no dialogue: write a line that begins USER: and one that begins ASSISTANT:"
        )
    return tuple(_check(turns, shown) for turns in dialogues if turns)


def _check(turns: list[tuple[str, str, int]], shown: str) -> Dialogue:
    try:
        check_order([(f"{shown}:{number}", role) for role, _, number in turns])
    except RowError as error:
        message = str(error)
        raise DataError(
            message if message.startswith(shown) else f"{shown}:{turns[0][2]}: {message}"
        ) from error
    if (marks := sum(text.count(IMAGE_MARK) for _, text, _ in turns)) > 1:
        raise DataError(
            f"{shown}:{turns[0][2]}: the dialogue has {marks} {IMAGE_MARK} marks; a frame is one image"
        )
    for role, text, number in turns:
        if not text:
            raise DataError(f"{shown}:{number}: the {role} turn is empty")
        if role != "user" and IMAGE_MARK in text:
            raise DataError(f"{shown}:{number}: only a user turn may hold an {IMAGE_MARK} mark")
    return tuple(
        Line(role, text, number, _columns(text, f"{shown}:{number}")) for role, text, number in turns
    )


def _columns(text: str, place: str) -> tuple[str, ...]:
    found = [match for match in PLACEHOLDER.finditer(text) if match.group() not in ("{{", "}}")]
    for match in found:
        if not (match.group(1) or "").strip():
            raise DataError(
                f"{place}: {match.group()!r} is no placeholder; write {{{{ and }}}} for braces that stay as they are"
            )
    return tuple(match.group(1).strip() for match in found)


def _fill(dialogue: Dialogue, frame: Frame, source: str) -> RawRow:
    labels = frame.labels or {}
    empty = next((column for line in dialogue for column in line.columns if not labels[column]), None)
    if empty is not None:
        return RawRow(source, error=f"column {empty!r} of labels.csv is empty for this frame: fill it in")

    def value(match: re.Match[str]) -> str:
        return match.group()[0] if match.group(1) is None else labels[match.group(1).strip()]

    turns = [{"role": line.role, "content": PLACEHOLDER.sub(value, line.text)} for line in dialogue]
    return RawRow(source, {"messages": turns, "image": f"frames/{frame.name}"}, labels)


def _match(
    frames: list[Frame], columns: list[str], rows: list[tuple[int, list[str]]], shown: str
) -> list[Frame]:
    """Each frame with its label row; then the label rows that have none."""
    lower = {column.lower(): number for number, column in reversed(list(enumerate(columns)))}
    key = next((lower[name] for name in IMAGE_COLUMNS if name in lower), None)
    if key is None:
        raise DataError(
            f"{shown}/labels.csv names no image: it needs a column {', '.join(IMAGE_COLUMNS)}; it has: {', '.join(columns)}"
        )
    known = _index([frame.name for frame in frames])
    labels: dict[str, tuple[int, dict[str, str]]] = {}
    bad = []
    for number, row in rows:
        source = f"{shown}/labels.csv:{number}"
        if len(row) != len(columns):
            bad.append(
                Frame(
                    source,
                    error=f"{len(row)} fields where the header has {len(columns)}: put quotes round text with commas",
                )
            )
            continue
        found = _find(known, row[key])
        if len(found) != 1:
            several = (
                f"fits {len(found)} frames ({', '.join(found[:3])}): name the file"
                if found
                else f"has no frame in {shown}/frames"
            )
            bad.append(Frame(source, error=f"{columns[key]} {row[key]!r} {several}"))
        elif found[0] in labels:
            bad.append(
                Frame(
                    source,
                    error=f"frame {found[0]} has a row already, on line {labels[found[0]][0]}: keep one",
                )
            )
        else:
            labels[found[0]] = (number, dict(zip(columns, row, strict=True)))
    return [
        replace(frame, labels=labels[frame.name][1]) if frame.name in labels else frame for frame in frames
    ] + bad


def _index(names: list[str]) -> Mapping[str | int, list[str]]:
    """Frames by name, by name without extension, and by the last number in the name."""
    known: dict[str | int, list[str]] = defaultdict(list)
    for name in names:
        stem = name.rpartition(".")[0]
        numbers = re.findall(r"[0-9]+", stem)
        known[name].append(name)
        known[stem].append(name)
        if numbers:
            known[int(numbers[-1])].append(name)
    return known


def _find(known: Mapping[str | int, list[str]], value: str) -> list[str]:
    name = value.replace("\\", "/").removeprefix("./").removeprefix("frames/")
    number = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else name
    return known.get(name) or known.get(number) or []


def _read_table(text: str, shown: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV text, and its rows with the number of the line each begins on. Its separator is
    `,` `;` or a tab."""
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
