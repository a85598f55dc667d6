"""Reads a frames folder: frames/*.jpg, dialogues in messages.txt, and values for {column} in labels.csv."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pyarrow import fs

from vlmtune.data.dialogues import Dialogue, check_columns, fill, parse_dialogues
from vlmtune.data.frame_key import IMAGE_COLUMNS, FrameNames, choose_key
from vlmtune.data.names import IMAGE_SUFFIXES, is_system_file, names_video
from vlmtune.data.question_columns import EXAMPLE_QUESTION, NO_COLUMNS, Columns
from vlmtune.data.records import RawRow
from vlmtune.data.splits_given import split_column
from vlmtune.data.tables import Table, read_table, read_text
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join

FILES_IN_MESSAGE = 5
NO_LABELS = "the frame has no row in labels.csv: add one, or take the frame away"

# The fields of Frame are part of the prepared store's key: see `source.fingerprint`.


@dataclass(frozen=True)
class Frame:
    """A frame with its row of labels.csv; or, if `error` is set, a row of labels.csv without a frame.

    Attributes:
        source: the place of the frame or of the row of labels.csv, for people.
        name: the path of the frame in frames/.
        version: size in bytes and time of the last change, so that a changed frame changes the fragment.
        labels: the row of labels.csv as {column: value}; None if the frame has none.
        kind: the error in words that are the same for all rows with this error.
    """

    source: str
    name: str = ""
    version: str = ""
    labels: dict[str, str] | None = None
    error: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class FramesFolder:
    """What a frames folder holds.

    Attributes:
        frames: the frames in the order of their names, then the rows of labels.csv without a frame.
        images: the name of the folder that holds the frames.
        notes: lines for people about how the files were read.
        unused: (name, number of rows) of each column that nothing uses.
        split_column: the column of labels.csv that says which rows are train, eval and test.
    """

    dialogues: tuple[Dialogue, ...]
    frames: list[Frame]
    images: str
    notes: tuple[str, ...] = ()
    unused: tuple[tuple[str, int], ...] = ()
    split_column: str | None = None


def scan_frames(
    folder: str, shown_path: str, group_by: str | None, names: Sequence[str], columns: Columns = NO_COLUMNS
) -> FramesFolder:
    """Read a frames folder's lists; its images are not opened.

    Args:
        folder: an absolute path or URI.
        shown_path: what messages call the folder.
        names: names of the files and folders in it.
        columns: the question in it, if there is one, takes the place of messages.txt.

    Raises:
        DataError: no frame can be used, because a file is missing or cannot be read, there is no dialogue,
            or labels.csv lacks a column that a placeholder or `group_by` names.
    """
    images = find_name(names, "frames") or "frames"
    frames, notes = _list_frames(join(folder, images), f"{shown_path}/{images}")
    labels_name = find_name(names, "labels.csv")
    dialogues = _dialogues(folder, shown_path, names, columns)
    if labels_name is None:
        check_columns(dialogues, None, f"{shown_path}/messages.txt")
        if group_by:
            raise DataError(f"--group_by {group_by}: there is no {shown_path}/labels.csv to hold this column")
        return FramesFolder(dialogues, frames, images, tuple(notes))
    labels = f"{shown_path}/{labels_name}"
    table = read_table(join(folder, labels_name), labels)
    if columns.question is not None and columns.answer_in not in table.columns:
        raise DataError(
            f"--answer_column {columns.answer_in}: {labels} has no such column; "
            f"it has: {', '.join(table.columns)}"
        )
    check_columns(dialogues, table.columns, f"{shown_path}/messages.txt")
    if group_by and group_by not in table.columns:
        raise DataError(
            f"--group_by {group_by}: {labels} has no such column; it has: {', '.join(table.columns)}"
        )
    placeholders = {column for dialogue in dialogues for line in dialogue for column in line.columns}
    key = choose_key(table, FrameNames([frame.name for frame in frames]), placeholders, labels)
    given = split_column(table.columns, [row for _, row in table.rows])
    used = {*placeholders, key.column, group_by, given}
    unused = [(f"column {name}", len(table.rows)) for name in table.columns if name not in used]
    matched = _match(frames, key.frames, table, shown_path, labels_name)
    return FramesFolder(dialogues, matched, images, (*notes, *table.notes, key.note), tuple(unused), given)


def no_dialogue(folder: str, shown_path: str, names: Sequence[str]) -> str:
    """What to do about a frames folder without messages.txt, with a line that is ready to paste."""
    labels = find_name(names, "labels.csv")
    columns = [] if labels is None else read_table(join(folder, labels), f"{shown_path}/{labels}").columns
    others = [column for column in columns if column.lower() not in IMAGE_COLUMNS]
    text = f"{shown_path} has frames/ but no messages.txt: "
    if not others:
        return f"{text}write an example dialogue there, with USER: and ASSISTANT: turns, and add labels.csv"
    answer = next((column for column in others if column.lower() in ("count", "label", "answer")), others[0])
    question = "How many people are there?" if answer.lower() == "count" else EXAMPLE_QUESTION
    return (
        f'{text}give --question "{question}" --answer_column {answer}, or write an example dialogue there, '
        "with USER: and ASSISTANT: turns"
    )


def _dialogues(folder: str, shown_path: str, names: Sequence[str], columns: Columns) -> tuple[Dialogue, ...]:
    """The dialogues of messages.txt, or the one dialogue that `--question` stands for."""
    messages = find_name(names, "messages.txt")
    if columns.question is None:
        messages = messages or "messages.txt"
        text = read_text(join(folder, messages), f"{shown_path}/{messages}")
        return parse_dialogues(text, f"{shown_path}/messages.txt")
    if messages is not None:
        raise DataError(f"{shown_path}/{messages} holds the dialogues: leave out --question, or the file")
    question = "\n".join(line for line in columns.question.splitlines() if line.strip())
    escaped = question.replace("{", "{{").replace("}", "}}")
    return parse_dialogues(f"USER: {escaped}\nASSISTANT: {{{columns.answer_in}}}", "--question")


def frame_rows(
    frames: Sequence[Frame], dialogues: Sequence[Dialogue], images: str, split_column: str | None = None
) -> Iterator[RawRow]:
    """A row for each frame and dialogue, in that order.

    A frame or label row that cannot be used gives one row with the reason.
    """
    for frame in frames:
        if frame.error:
            yield RawRow(frame.source, error=frame.error, error_kind=frame.kind)
            continue
        usable = [
            number
            for number, dialogue in enumerate(dialogues)
            if frame.labels is not None or not any(line.columns for line in dialogue)
        ]
        for number in usable:
            source = frame.source if len(dialogues) == 1 else f"{frame.source} (dialogue {number + 1})"
            yield _row(dialogues[number], frame, source, images, split_column)
        if len(usable) < len(dialogues):
            yield RawRow(frame.source, error=NO_LABELS)


def find_name(names: Sequence[str], wanted: str) -> str | None:
    """The file of this name in a folder, in upper or lower case; None if there is none, or several."""
    if wanted in names:
        return wanted
    alike = [name for name in names if name.lower() == wanted]
    return alike[0] if len(alike) == 1 else None


def _row(dialogue: Dialogue, frame: Frame, source: str, images: str, split_column: str | None) -> RawRow:
    labels = frame.labels or {}
    empty = next((column for line in dialogue for column in line.columns if not labels[column]), None)
    if empty is not None:
        return RawRow(source, error=f"column {empty!r} of labels.csv is empty for this frame: fill it in")
    record = {"messages": fill(dialogue, labels), "image": f"{images}/{frame.name}"}
    return RawRow(
        source, record, group_fields=labels, split=labels.get(split_column) if split_column else None
    )


def _match(
    frames: list[Frame], found: list[list[str]], table: Table, shown_path: str, labels_name: str
) -> list[Frame]:
    """Each frame with its row of labels.csv; then a Frame with an error for each row without one frame.

    Args:
        found: for each row of labels.csv, its label for messages and the frames that it may mean
            (`Key.frames`).
    """
    labels: dict[str, tuple[int, dict[str, str]]] = {}
    bad = []
    for (line, row), names in zip(table.rows, found, strict=True):
        source = f"{shown_path}/{labels_name}:{line}"
        if len(row) != len(table.columns):
            fields = f"{len(row)} fields where the header has {len(table.columns)}"
            bad.append(Frame(source, error=f"{fields}: put quotes round text with commas"))
        elif not names[1:]:
            reason = f"{names[0]} has no frame in {shown_path}/frames"
            bad.append(Frame(source, error=reason, kind="the row has no frame in frames/"))
        elif len(names) > 2:
            several = f"fits {len(names) - 1} frames ({', '.join(names[1:4])}): name the file"
            bad.append(Frame(source, error=f"{names[0]} {several}", kind="the row fits several frames"))
        elif names[1] in labels:
            reason = f"frame {names[1]} has a row already, on line {labels[names[1]][0]}: keep one"
            bad.append(Frame(source, error=reason, kind="its frame has a row already: keep one"))
        else:
            labels[names[1]] = (line, dict(zip(table.columns, row, strict=True)))
    matched = [
        replace(frame, labels=labels[frame.name][1]) if frame.name in labels else frame for frame in frames
    ]
    return matched + bad


def _list_frames(folder: str, shown_path: str) -> tuple[list[Frame], list[str]]:
    """The frames below a folder in name order, and a note on files there that are not read."""
    system, path = filesystem(folder)
    inside = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    files = {
        info.path.removeprefix(f"{path.rstrip('/')}/"): info
        for info in inside
        if info.type == fs.FileType.File and not is_system_file(info.base_name)
    }
    names = sorted(
        name
        for name in files
        if name.lower().endswith(IMAGE_SUFFIXES) and not any(map(is_system_file, name.split("/")))
    )
    others = sorted(files.keys() - set(names))
    first = ", ".join(others[:FILES_IN_MESSAGE]) + (", …" if len(others) > FILES_IN_MESSAGE else "")
    if not names:
        video = "; a video is not read: save its frames as images" if any(map(names_video, others)) else ""
        raise DataError(
            f"{shown_path} holds no image that ends in {', '.join(IMAGE_SUFFIXES[:8])} … "
            f"(files there: {len(files)}{': ' + first if others else ''}){video}"
        )
    notes = [f"{len(others)} files of {shown_path} are no images and are not read: {first}"] if others else []
    return [
        Frame(f"{shown_path}/{name}", name, f"{files[name].size} {files[name].mtime_ns}") for name in names
    ], notes
