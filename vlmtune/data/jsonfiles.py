"""Streams the rows of JSONL files and JSON arrays: strict JSON, limited memory, the place of each error."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from vlmtune.data.records import RawRow
from vlmtune.errors import DataError

MAX_ROW_BYTES = 16_000_000
BLOCK_BYTES = 8_000_000
READ_BYTES = 1_000_000
BOM = b"\xef\xbb\xbf"
SPACE = " \t\r\n"
PYTHON_DICT = re.compile(rb"\s*\{\s*'")  # an object as Python prints it
# Fields that show that an object is a row, not an object that contains the rows.
ROW_FIELDS = {
    *("messages", "conversations", "prompt", "completion", "instruction", "output", "query", "response"),
    *("question", "answer", "image", "images", "file_name"),
}


class StrictDecoder:
    """A JSON decoder that reports NaN, Infinity and repeated keys, which json.JSONDecoder accepts."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str | None]:
        """The value that begins at `start`, the index after it, and its fault if it parses but is not JSON.

        Raises:
            json.JSONDecodeError: it does not parse.
            ValueError: a number has thousands of digits.
            RecursionError: objects or lists are nested too deep.
        """
        self._faults.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._faults[0] if self._faults else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    break
                seen.add(name)
            self._faults.append(f"field {name[:80]!r} stands twice in one object: keep one")
        return fields

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is not JSON: write a number, a string or null")


def spans_lines(head: str) -> bool:
    """Whether the first object of a text spans several lines, so that the file is not JSONL.

    Args:
        head: the beginning of a file, perhaps not all of its first object.
    """
    first_line = head.partition("\n")[0].strip(SPACE)
    try:
        _, end, _ = StrictDecoder().decode(head)
    except (ValueError, RecursionError):
        return first_line in ("{", "[")
    return "\n" in head[:end]


def no_rows(head: str) -> str | None:
    """What to do about a file whose first object contains the rows; None if that object is a row.

    Args:
        head: the beginning of a file.
    """
    decoder, at = StrictDecoder(), _skip(head, 1)
    try:
        while head[at : at + 1] == '"':
            name, at, _ = decoder.decode(head, at)
            at = _skip(head, _skip(head, at) + 1)  # over the colon
            first = _skip(head, at + 1)
            if head[at : at + 1] == "{" and re.match(r'"\d+"\s*:', head[first:]):
                return "it holds columns, as pandas writes them: write rows with to_json(orient='records')"
            if name in ROW_FIELDS:
                return None
            if head[at : at + 1] == "[" and head[first : first + 1] == "{":
                item, _, _ = decoder.decode(head, first)
                if ROW_FIELDS & item.keys():
                    return f"the rows are inside {name!r}: give that array alone, in a file of its own"
            _, at, _ = decoder.decode(head, at)
            at = _skip(head, _skip(head, at) + 1)  # over the comma
    except (ValueError, RecursionError):
        pass  # the object continues after the head, or is not JSON, which its reader will report
    return None


def _skip(text: str, at: int) -> int:
    """The index of the next character that is no space."""
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def split_lines(file: IO[bytes], block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, int]]:
    """Byte ranges of about `block_bytes` that end where lines end: (start, stop, number of the first line).

    It reads the file once, with one block in memory.
    """
    start = position = 0
    line = 1
    while block := file.read(block_bytes):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield start, position + cut, line
            start, line = position + cut, line + block.count(b"\n")
        position += len(block)
    if start < position:
        yield start, position, line


def read_lines(
    file: IO[bytes], shown_path: str, start: int, stop: int, line: int, max_bytes: int = MAX_ROW_BYTES
) -> Iterator[RawRow]:
    """The rows of a JSONL file from byte `start`, where line number `line` begins, to `stop`.

    Blank lines count as lines and give no row.
    """
    file.seek(start)
    reader = io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
    decoder = StrictDecoder()
    position = start
    while position < stop:
        text = reader.readline(max_bytes + 1)
        position += len(text)
        source = f"{shown_path}:{line}"
        line += 1
        if len(text) > max_bytes and not text.endswith(b"\n"):
            while position < stop and (rest := reader.readline(1 << 20)):
                position += len(rest)
                if rest.endswith(b"\n"):
                    break
            limit = f"{max_bytes // 10**6} MB"
            yield RawRow(
                source, error=f"the line is longer than {limit}: keep images in files, not in the text"
            )
            continue
        text = text.removeprefix(BOM) if position == len(text) else text
        if text.strip():
            yield _line(text, source, decoder)


def _line(text: bytes, source: str, decoder: StrictDecoder) -> RawRow:
    try:
        decoded = text.decode().rstrip(SPACE)
        begin = len(decoded) - len(decoded.lstrip(SPACE))
        record, end, fault = decoder.decode(decoded, begin)
    except UnicodeDecodeError as error:
        return RawRow(
            source, error=f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        hint = (
            "; Python's own notation is not JSON: write rows with json.dumps"
            if PYTHON_DICT.match(text)
            else ""
        )
        return RawRow(source, error=f"not JSON at column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:
        return RawRow(source, error=_unreadable(error))
    if end < len(decoded) and decoded[end:].strip(SPACE) != ",":  # the lines of an array are rows too
        return RawRow(source, error=f"not JSON at column {end + 1}: more text after the end of the row")
    return RawRow(source, record, group_fields=record, error=fault)


class ArrayReader:
    """The rows of a file that holds one JSON array, or objects one after another over several lines.

    The file is read in blocks, so it may be larger than memory. A comma after the last item is allowed.
    """

    def __init__(self, file: IO[bytes], shown_path: str, max_chars: int = MAX_ROW_BYTES) -> None:
        self._file, self._shown_path, self._max_chars = file, shown_path, max_chars
        # Bytes that are not UTF-8 become lone surrogates, so that only the row that holds them is bad.
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # where self._text begins in the file

    def __iter__(self) -> Iterator[RawRow]:
        """A row for each item.

        Raises:
            DataError: a text is not JSON; nothing after it can be read.
        """
        decoder = StrictDecoder()
        number = 0
        try:
            in_array = self._peek() == "["
            self._at += in_array
            while self._peek() not in (("]",) if in_array else ("",)):
                record, fault = self._item(decoder)
                yield RawRow(f"{self._shown_path}[{number}]", record, group_fields=record, error=fault)
                number += 1
                if self._peek() == ",":
                    self._at += 1
                elif in_array and self._peek() != "]":
                    raise json.JSONDecodeError("expected , or ]", self._text, self._at)
            self._at += in_array
            if self._peek():
                raise json.JSONDecodeError("more text after the end of the array", self._text, self._at)
        except json.JSONDecodeError as error:
            column = error.colno + (self._column if error.lineno == 1 else 0)
            self._broken(
                number, f"not JSON at line {self._line + error.lineno - 1}, column {column}: {error.msg}"
            )
        except (ValueError, RecursionError) as error:
            self._broken(number, _unreadable(error))

    def _broken(self, number: int, reason: str) -> NoReturn:
        raise DataError(
            f"{self._shown_path}[{number}]: {reason}; nothing after it in this file can be read: repair the "
            "file"
        )

    def _item(self, decoder: StrictDecoder) -> tuple[Any, str | None]:
        self._peek()
        while True:
            try:
                value, end, fault = decoder.decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may continue in the next block
                    self._at = end
                    return value, fault
                self._more()
            except json.JSONDecodeError:
                if len(self._text) - self._at > self._max_chars or not self._more():
                    raise

    def _peek(self) -> str:
        """The next character that is no space, not read yet; an empty string at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Drop the text that was used and read another block; False at the end of the file.

        A block is at least as long as the text that is left, so that a long item is decoded only a few times.
        """
        if self._ended:
            return False
        block = self._file.read(max(READ_BYTES, len(self._text) - self._at))
        self._ended = not block
        done = self._text[: self._at]
        self._line += done.count("\n")
        self._column = len(done) - done.rfind("\n") - 1 + (0 if "\n" in done else self._column)
        self._text, self._at = self._text[self._at :] + self._utf8.decode(block, final=self._ended), 0
        return True


def _unreadable(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "objects or lists nested too deep"
    return f"JSON that cannot be read: {error}"
