"""Recognize the format of a data file from its first bytes and its name."""

import re

from vlmtune.data.fragment import suffix
from vlmtune.data.jsonfiles import StrictDecoder, no_rows, spans_lines
from vlmtune.errors import DataError

UNDERSTOOD = (
    "a folder with frames/, messages.txt and labels.csv; "
    ".jsonl, .json, .csv or .parquet files of questions and answers, instructions, messages or LLaVA rows; "
    "images with metadata.csv, or in a folder for each class; COCO captions, VQA, WebDataset shards; "
    "a Hugging Face dataset by name or saved folder"
)

FORMAT_OF_SUFFIX = {
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}

HEAD_BYTES = 64_000

GZIP = b"\x1f\x8b"


def recognize_file(head: bytes, shown_path: str) -> str:
    """The format of a file, "parquet", "json" or "jsonl", by its first bytes and, if needed, its name.

    Raises:
        DataError: the file is empty, or in a format that vlmtune does not read.
    """
    named = FORMAT_OF_SUFFIX.get(suffix(shown_path))
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        raise DataError(f"{shown_path} is empty: nothing to learn from")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{shown_path} is UTF-16 text: save it as UTF-8")
    if named == "parquet":
        raise DataError(f"{shown_path} is no Parquet file")
    if head.startswith(GZIP):
        raise DataError(f"{shown_path} is compressed with gzip: unpack it with gunzip")
    if re.fullmatch(rb"\[\s*\]", text):
        raise DataError(f"{shown_path} is an empty array: nothing to learn from")
    one_a_line = _parses(text.partition(b"\n")[0])
    if text.startswith(b"[") and not (named == "jsonl" and one_a_line):
        return "json"
    if text.startswith(b"{"):
        start = text.decode(errors="ignore")
        if (reason := no_rows(start)) is not None:
            raise DataError(f"{shown_path}: {reason}")
        if spans_lines(start):
            return "json"
    if named == "json" and not one_a_line and len(head) < HEAD_BYTES:
        raise DataError(
            f"{shown_path} is neither an array of rows, [{{…}}, …], nor one row a line: put its rows in [ ]"
        )
    if named or text.startswith(b"{"):
        return "jsonl"
    raise DataError(f"{shown_path} is no format that is understood. Understood: {UNDERSTOOD}")


def _parses(line: bytes) -> bool:
    try:
        StrictDecoder().decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return True
