"""Reads files with one JSON object of lists, the form in which COCO and VQA are published."""

import json
import re
from typing import Any

from vlmtune.data.fragment import PathContents, open_file
from vlmtune.errors import DataError

# First names of such objects, with which no row begins.
FIRST_NAME = re.compile(
    rb'\s*\{\s*"(info|licenses?|categories|annotations|questions|task_type|data_type|data_subtype'
    rb'|images"\s*:\s*\[\s*\{)'
)


def is_object_of_lists(contents: PathContents, names: tuple[str, ...]) -> bool:
    """Whether a file holds one object that has a list under each of these names."""
    head = (contents.head or b"").removeprefix(b"\xef\xbb\xbf")
    if contents.suffix != ".json" or not FIRST_NAME.match(head):
        return False
    content = load_object(contents.whole.path, contents.whole.shown_path)
    return all(isinstance(content.get(name), list) for name in names)


def load_object(path: str, shown_path: str) -> dict[str, Any]:
    """The object in a file, read into memory as a whole.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        with open_file(path) as file:
            content = json.loads(file.read())
    except ValueError as error:
        raise DataError(f"{shown_path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown_path} must hold one JSON object")
    return content
