"""Makes a question and an answer of a table's row, by `--columns`, `--question` and `--answer_column`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.image_paths import RowError
from vlmtune.data.names import names_image
from vlmtune.data.records import REQUIRED_FIELDS
from vlmtune.data.row_shapes import DIALOGUE_FIELDS, QUESTION_FIELDS, question_fields
from vlmtune.data.row_values import json_type
from vlmtune.errors import DataError

# Columns that are read as the image if there is no `image` or `images` and their values name image files.
IMAGE_COLUMNS = (
    *("image_path", "image_file", "image_name", "image_url", "img", "img_path", "file_name", "filename"),
    *("file", "path", "photo", "frame"),
)
OWN_QUESTION = (*DIALOGUE_FIELDS, *(question for question, _ in QUESTION_FIELDS))
LABEL = "label"  # the column that answers `--question` if no `--answer_column` is given
EXAMPLE_QUESTION = "What is in this image?"
# Columns whose names may be written in any case, as in Image,Question,Answer.
ANY_CASE = {
    *(*IMAGE_COLUMNS, "image", "images", LABEL, "split", "system"),
    *(field for pair in QUESTION_FIELDS for field in pair),
    *(field for fields in REQUIRED_FIELDS.values() for field in fields),
}


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are read as which field, and the question of rows without a dialogue.

    Attributes:
        names: (field, column), such as ("image", "photo").
        question: the question that is asked about every row.
        answer_column: the column that answers `question`; by default `answer` or `label`.
        answers: whether rows must have answers; False for rows that a model shall answer.
    """

    names: tuple[tuple[str, str], ...] = ()
    question: str | None = None
    answer_column: str | None = None
    answers: bool = True

    @property
    def read(self) -> set[str]:
        """Columns that are read in addition to the fields that vlmtune knows."""
        named = {column for _, column in self.names}
        answer = {self.answer_column or LABEL} if self.question is not None else set()
        return named | answer | set(IMAGE_COLUMNS)

    @property
    def answer_in(self) -> str:
        """The column of labels that answers `question`."""
        return self.answer_column or LABEL

    def apply(self, record: Any) -> Any:
        """The record with columns renamed to the fields that they are read as, and with `question`.

        Raises:
            RowError: the record lacks a column that an option names, or has a question of its own.
        """
        if not isinstance(record, Mapping):
            return record
        row = self._renamed(self._in_known_case(record))
        if self.question is not None:
            self._ask(row)
        if (column := _image_column(row)) is not None:
            row["image"] = row.pop(column)
        return row

    def image_note(self, record: Any) -> str | None:
        """A note for a row whose image was found in a column that no option names."""
        if not isinstance(record, Mapping) or any(field in ("image", "images") for field, _ in self.names):
            return None
        column = _image_column(self._in_known_case(record))
        return None if column is None else f"{column} is read as the image"

    def _in_known_case(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the names of known fields in lower case, except columns that an option names."""
        kept = {*(column for _, column in self.names), self.answer_column}
        renamed = {
            name: name.lower()
            for name in record
            if isinstance(name, str)
            and name not in kept
            and name.lower() != name
            and name.lower() in ANY_CASE
            and name.lower() not in record
        }
        return {renamed.get(name, name): value for name, value in record.items()} if renamed else record

    def _renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        missing = next((pair for pair in self.names if pair[1] not in record), None)
        if missing is not None:
            raise RowError(f"no column {missing[1]!r} (--columns {missing[0]}={missing[1]})")
        moved = {column for _, column in self.names}
        row = {name: value for name, value in record.items() if name not in moved}
        return row | {field: record[column] for field, column in self.names}

    def _ask(self, row: dict[str, Any]) -> None:
        own = next((field for field in OWN_QUESTION if row.get(field) not in (None, "")), None)
        if own is not None:
            raise RowError(f"the row has a question of its own in {own!r}: leave out --question")
        column = self.answer_column or ("answer" if "answer" in row else LABEL)
        if column not in row and not self.answers:
            row["question"] = self.question
            return
        if column not in row:
            flag = "--answer_column" if self.answer_column else "--question"
            raise RowError(f"no column {column!r} that holds the answer ({flag})")
        row |= {"question": self.question, "answer": plain_text(row.pop(column), column)}

    def check(self, names: Sequence[str], shown_path: str) -> None:
        """Raises DataError if rows with these columns cannot have a question and an answer."""
        has = f"it has: {', '.join(names)}"
        for field, column in self.names:
            if column not in names:
                raise DataError(f"--columns {field}={column}: {shown_path} has no column {column!r}; {has}")
        if self.answer_column is not None and self.answer_column not in names:
            raise DataError(f"--answer_column {self.answer_column}: {shown_path} has no such column; {has}")
        known = set(self._in_known_case(dict.fromkeys(names)))
        fields = {*known, *(field for field, _ in self.names)} - {column for _, column in self.names}
        own = self._own_fields(fields)
        if self.question is None and own is None:
            raise DataError(
                f"{shown_path} has no columns with a question and its answer; {has}. {self.hint(names)}"
            )
        if self.question is None:
            return
        if own is not None:
            raise DataError(
                f"{shown_path} has questions of its own in column {own[0]!r}: leave out --question"
            )
        if self.answers and self.answer_column is None and not {"answer", LABEL} & fields:
            raise DataError(
                f"--question: name the column of {shown_path} with its answer: --answer_column; {has}"
            )

    def _own_fields(self, fields: set[str]) -> tuple[str, ...] | None:
        """The fields with the question and (if `answers`) the answer of rows with these fields; else None."""
        pair = question_fields(fields)
        if pair is not None:
            return pair
        whole = (required for required in REQUIRED_FIELDS.values() if fields >= set(required))
        question = ((field,) for field in OWN_QUESTION if field in fields and not self.answers)
        return next(whole, None) or next(question, None)

    def hint(self, names: Sequence[str]) -> str:
        """What to add to the command line, ready to paste, for a table with these columns."""
        image = next((name for name in names if name.lower() in ("image", *IMAGE_COLUMNS)), None)
        others = [name for name in names if name not in (image, "id", "split")]
        if image is None and len(others) > 2:
            image, *others = others
        is_known = image is not None and image.lower() in ("image", *IMAGE_COLUMNS)
        pairs = [f"image={_quoted(image)}"] if image is not None and not is_known else []
        if len(others) >= 2:
            pairs += [f"question={_quoted(others[0])}", f"answer={_quoted(others[1])}"]
            return (
                f"Say which is which: --columns {' '.join(pairs)}; or give one question for all rows: "
                f'--question "{EXAMPLE_QUESTION}" --answer_column {_quoted(others[-1])}'
            )
        if others:
            question = others[0] if others[0].endswith("?") else EXAMPLE_QUESTION
            return f'Give a question: --question "{question}" --answer_column {_quoted(others[0])}'
        return "Add a column with the answers"


NO_COLUMNS = Columns()


def _image_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds a row's image, if it has no `image` or `images`."""
    if row.get("image") is not None or row.get("images") is not None:
        return None
    return next((name for name in IMAGE_COLUMNS if is_image(row.get(name))), None)


def columns_from(
    names: Mapping[str, str] | None,
    question: str | None,
    answer_column: str | None,
    *,
    answers: bool = True,
) -> Columns:
    """`Columns` of the options `--columns`, `--question` and `--answer_column`."""
    return Columns(tuple(sorted((names or {}).items())), question, answer_column, answers)


def is_image(value: Any) -> bool:
    """Whether a value of a column is an image: encoded, or the name of an image file."""
    if isinstance(value, Mapping):
        return is_image(value.get("path")) or isinstance(value.get("bytes"), bytes)
    return names_image(value)


def plain_text(value: Any, column: str) -> str:
    """A value of a column as the text of an answer; whole numbers have no decimal point.

    Raises:
        RowError: the value is empty, or a list or object.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and value == value:
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    actual = "empty" if value is None or value != value or value == "" else json_type(value)
    raise RowError(f"column {column!r} holds the answer, but is {actual}: fill it in, or take the row out")


def _quoted(name: str | None) -> str:
    text = str(name)
    return f'"{text}"' if " " in text else text
