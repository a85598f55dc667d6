"""Reads folders of images: with Hugging Face's metadata.csv or metadata.jsonl, or with a folder per class."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyarrow import fs

from vlmtune.data.file_formats.table_files import table_rows
from vlmtune.data.fragment import Format, Fragment, PathContents, open_file, suffix
from vlmtune.data.jsonfiles import read_lines
from vlmtune.data.names import IMAGE_SUFFIXES
from vlmtune.data.question_columns import EXAMPLE_QUESTION, LABEL
from vlmtune.data.records import RawRow
from vlmtune.data.splits_given import split_of_name
from vlmtune.data.tables import read_table
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column of metadata files that names the image
IMAGES_PER_FRAGMENT = 256
CLASSES_IN_MESSAGE = 4
# A folder with such files holds lists or settings, and is not a class.
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".tar")


def _has_metadata(contents: PathContents) -> bool:
    return any(name in METADATA_FILES for name in contents.files) or bool(_split_folders(contents))


def _split_folders(contents: PathContents) -> list[str]:
    """The folders of splits, each with a metadata file, such as train/ and test/."""
    folders = []
    for folder in contents.folders:
        system, inner = filesystem(join(contents.whole.path, folder))
        names = {entry.base_name for entry in system.get_file_info(fs.FileSelector(inner))}
        if names & set(METADATA_FILES):
            folders.append(folder)
    return folders


def _cut_metadata(contents: PathContents) -> list[Fragment]:
    whole = contents.whole
    if not any(name in METADATA_FILES for name in contents.files):
        return [
            fragment
            for folder in _split_folders(contents)
            for fragment in _metadata_fragments(replace(_inside(whole, folder), split=split_of_name(folder)))
        ]
    return _metadata_fragments(whole)


def _metadata_fragments(whole: Fragment) -> list[Fragment]:
    system, inner = filesystem(whole.path)
    names = sorted(entry.base_name for entry in system.get_file_info(fs.FileSelector(inner)))
    name = next(name for name in names if name in METADATA_FILES)
    fragment = replace(_inside(whole, name), format=METADATA.name)
    if name == "metadata.csv":
        columns = read_table(fragment.path, fragment.shown_path).columns
    else:
        first = next((row for row in _metadata_rows(fragment) if row.error is None), None)
        columns = [] if first is None else list(first.record)
    if FILE_NAME not in columns and not {"image", "images"} & {field for field, _ in whole.columns.names}:
        raise DataError(
            f"{fragment.shown_path} has no column {FILE_NAME!r} with the images' names; it has: "
            f"{', '.join(columns)}"
        )
    whole.columns.check(columns, fragment.shown_path)
    return [replace(fragment, rules=replace(fragment.rules, root=whole.path))]


def _metadata_rows(fragment: Fragment) -> Iterator[RawRow]:
    if fragment.path.endswith(".csv"):
        yield from table_rows(fragment.path, fragment.shown_path)
        return
    system, inner = filesystem(fragment.path)
    size = system.get_file_info(inner).size
    with open_file(fragment.path) as file:
        yield from read_lines(file, fragment.shown_path, 0, size, 1)


def _holds_images(contents: PathContents) -> bool:
    if any(suffix(name) in DATA_SUFFIXES for name in contents.files) or "frames" in contents.folders:
        return False
    if any(_holds_lists(join(contents.whole.path, folder)) for folder in contents.folders):
        return False
    return any(suffix(name) in IMAGE_SUFFIXES for name in contents.files) or bool(
        _images(contents.whole.path)
    )


def _holds_lists(folder: str) -> bool:
    """Whether a folder holds data files and no image, such as `annotations` beside `images`."""
    system, inner = filesystem(folder)
    kinds = {suffix(entry.base_name) for entry in system.get_file_info(fs.FileSelector(inner))}
    return bool(kinds & set(DATA_SUFFIXES)) and not kinds & set(IMAGE_SUFFIXES)


def _images(folder: str) -> list[str]:
    """The images below a folder, as paths relative to it, in alphabetical order."""
    system, inner = filesystem(folder)
    entries = system.get_file_info(fs.FileSelector(inner, recursive=True))
    paths = (entry.path[len(inner) :].lstrip("/") for entry in entries if entry.type == fs.FileType.File)
    return sorted(
        path
        for path in paths
        if suffix(path) in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.split("/"))
    )


def _cut_classes(contents: PathContents) -> list[Fragment]:
    whole, names = contents.whole, _images(contents.whole.path)
    unsorted = [name for name in names if "/" not in name]
    if unsorted:
        raise DataError(
            f"{whole.shown_path} holds images ({unsorted[0]}) and no file that says what to answer "
            "about them: add a metadata.csv with columns file_name, question and answer, or sort them into "
            "a folder for "
            "each class"
        )
    classes = sorted({_class_of(name) for name in names})
    more = len(classes) - CLASSES_IN_MESSAGE
    listed = ", ".join(classes[:CLASSES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
    if whole.columns.question is None:
        raise DataError(
            f"{whole.shown_path} holds images in a folder for each class ({listed}): give the question "
            f'that the folder\'s name answers: --question "{EXAMPLE_QUESTION}"'
        )
    if len(classes) < 2:
        raise DataError(
            f"{whole.shown_path} holds one class alone ({listed}): every answer would be the same"
        )
    fragment = replace(whole, format=CLASS_FOLDERS.name, rules=replace(whole.rules, root=whole.path))
    return [
        replace(fragment, files=tuple(part[first : first + IMAGES_PER_FRAGMENT]), split=split)
        for split, part in _by_split(names)
        for first in range(0, len(part), IMAGES_PER_FRAGMENT)
    ]


def _by_split(names: list[str]) -> list[tuple[str | None, list[str]]]:
    """The images of each split, as in train/cat/1.jpg and test/cat/2.jpg."""
    by_split: dict[str | None, list[str]] = {}
    for name in names:
        folder, *rest = name.split("/")
        by_split.setdefault(split_of_name(folder) if len(rest) > 1 else None, []).append(name)
    return list(by_split.items())


def _class_of(name: str) -> str:
    return name.split("/")[-2]


def _class_rows(fragment: Fragment) -> Iterator[RawRow]:
    for name in fragment.files:
        record: dict[str, Any] = {"image": name, LABEL: _class_of(name)}
        yield RawRow(f"{fragment.shown_path}/{name}", record, group_fields=record)


def _inside(whole: Fragment, name: str) -> Fragment:
    return replace(whole, path=join(whole.path, name), shown_path=f"{whole.shown_path}/{name}")


METADATA = Format("imagefolder", _has_metadata, _cut_metadata, _metadata_rows)
CLASS_FOLDERS = Format("class folders", _holds_images, _cut_classes, _class_rows)
