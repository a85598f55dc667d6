"""Recognize the data at a path, in every known format, and divide it into fragments: `scan`."""

import re
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from vlmtune.compat.datasets import fingerprint_of
from vlmtune.data.class_names import class_names, notes_on
from vlmtune.data.columns import readable_columns, unread_columns
from vlmtune.data.file_formats import FILE_FORMATS, FOLDER_FORMATS
from vlmtune.data.file_kind import FORMAT_OF_SUFFIX, HEAD_BYTES, UNDERSTOOD, recognize_file
from vlmtune.data.fragment import Fragment, PathContents, open_file, suffix
from vlmtune.data.frames import find_name, no_dialogue, scan_frames
from vlmtune.data.hub_datasets import dataset_folder, extracted_folder, load_splits
from vlmtune.data.image_paths import ImageRules, check_links
from vlmtune.data.jsonfiles import BLOCK_BYTES, split_lines
from vlmtune.data.question_columns import NO_COLUMNS, Columns
from vlmtune.data.splits_given import split_of_name
from vlmtune.errors import DataError
from vlmtune.shown_text import redacted
from vlmtune.storage import absolute, filesystem, join, one_line, parent, scheme

FRAMES_PER_FRAGMENT = 256
ROWS_PER_FRAGMENT = 1024  # of a Hugging Face dataset
NAMES_IN_MESSAGE = 6
FOLDERS_LOOKED_AT = 20  # subfolders that are searched for data files, for a hint in a message
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def scan(
    data_path: str,
    *,
    image_root: str | None = None,
    group_by: str | None = None,
    allow_outside_paths: bool = False,
    allow_remote_images: bool = False,
    columns: Columns = NO_COLUMNS,
) -> list[Fragment]:
    """Recognize the data at `data_path` and divide it into fragments, in the order of its rows.

    JSONL files are read once, to count lines. Other files are only opened.

    Args:
        data_path: a file, folder, URI or hub name.
        image_root: the folder that image paths are relative to; by default the folder of the file that names
            them. In a frames folder, they are always relative to the folder itself.
        columns: which columns are read as which field, and the question of rows without a dialogue.

    Raises:
        DataError: the data as a whole cannot be read. Single bad rows are found by `read_fragment`.
    """
    shown_path = redacted(data_path.rstrip("/") or data_path)
    try:
        path = absolute(data_path)
        system, inner = filesystem(path)
        info = system.get_file_info(inner)
        folder = path if info.type == fs.FileType.Directory else parent(path)
        root = absolute(image_root) if image_root else folder
        rules = ImageRules(root, allow_outside_paths, allow_remote_images)
        # One fragment for all of the data, to be recognized and divided.
        whole = Fragment("", path, shown_path, rules, group_by, columns=columns)
        if image_root:
            _check_image_root(root, image_root)
        if info.type == fs.FileType.Directory:
            return _scan_folder(whole, system.get_file_info(fs.FileSelector(inner)))
        if info.type == fs.FileType.File:
            return _scan_file(whole) or _no_rows(whole)
        return _scan_hub(whole, image_root)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{shown_path} cannot be read: {one_line(error)}") from error


def _scan_folder(whole: Fragment, entries: list[fs.FileInfo]) -> list[Fragment]:
    shown_path = whole.shown_path
    check_links(whole.path, shown_path, whole.rules)
    names = [entry.base_name for entry in entries]
    found = _found(whole, entries)
    if {"dataset_info.json", "state.json"} <= set(names) or "dataset_dict.json" in names:
        return _scan_dataset(replace(whole, format="saved"))
    files = sorted(
        name for name in names if suffix(name) in FORMAT_OF_SUFFIX and not name.startswith((".", "_", "~"))
    )
    messages = find_name(names, "messages.txt")
    if messages or find_name(names, "frames"):
        files = [name for name in files if name.lower() != "labels.csv"]
    if messages and files:
        raise DataError(
            f"{shown_path} holds both messages.txt and {files[0]}: give the one to read its own folder"
        )
    frames = find_name(names, "frames") is not None and not files
    if messages or (frames and whole.columns.question is not None):
        return _scan_frames(whole, names)
    format = next((format for format in FOLDER_FORMATS if format.recognizes(found)), None)
    if format is not None:
        return format.cut(found)
    if frames:
        raise DataError(no_dialogue(whole.path, shown_path, names))
    if not files:
        raise DataError(
            f"{shown_path} holds {_listed(names)}, no data that is understood{_below(whole, names)}. "
            f"Understood: {UNDERSTOOD}"
        )
    fragments = [
        fragment
        for name in files
        for fragment in _scan_file(_inside(replace(whole, split=split_of_name(name)), name))
    ]
    first_of_format = {fragment.format: fragment.shown_path for fragment in reversed(fragments)}
    if len(first_of_format) > 1:
        mixed = " and ".join(sorted(first_of_format.values()))
        raise DataError(
            f"{shown_path} mixes formats: {mixed}; give one of the files, such as --data_path "
            f"{fragments[0].shown_path}"
        )
    return fragments


def _scan_file(whole: Fragment) -> list[Fragment]:
    with open_file(whole.path) as file:
        head = file.read(HEAD_BYTES)
    found = PathContents(whole, head=head)
    format = next((format for format in FILE_FORMATS if format.recognizes(found)), None)
    if format is not None:
        return format.cut(found)
    kind = recognize_file(head, whole.shown_path)
    if kind == "parquet":
        return _scan_parquet(whole)
    if kind == "json":
        return [replace(whole, format="json")]
    with open_file(whole.path) as file:
        return [
            replace(whole, format="jsonl", start=start, stop=stop, first_number=line)
            for start, stop, line in split_lines(file, BLOCK_BYTES)
        ]


def _scan_frames(whole: Fragment, names: list[str]) -> list[Fragment]:
    found = scan_frames(whole.path, whole.shown_path, whole.group_by, names, whole.columns)
    rules = replace(whole.rules, root=whole.path)
    fragment = replace(
        whole,
        format="frames",
        columns=NO_COLUMNS,  # the question is in the dialogues already
        rules=rules,
        dialogues=found.dialogues,
        images=found.images,
        split_column=found.split_column,
    )
    fragments = [
        replace(fragment, frames=tuple(found.frames[first : first + FRAMES_PER_FRAGMENT]))
        for first in range(0, len(found.frames), FRAMES_PER_FRAGMENT)
    ]
    return [replace(fragments[0], reading_notes=found.notes, unused=found.unused), *fragments[1:]]


def _scan_parquet(whole: Fragment) -> list[Fragment]:
    with open_file(whole.path) as file, pq.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names, whole)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        unused = unread_columns(
            table.schema_arrow, whole.group_by, sum(sizes), whole.shown_path, whole.columns.read
        )
        notes = _class_notes(table.schema_arrow, whole)
    if not sum(sizes):
        raise DataError(f"{whole.shown_path} has no rows: nothing to learn from")
    firsts = accumulate(sizes, initial=0)
    return [
        replace(
            whole,
            format="parquet",
            start=group,
            first_number=first,
            unused=() if group else unused,
            reading_notes=() if group else notes,
        )
        for group, first in zip(range(len(sizes)), firsts, strict=False)
    ]


def _scan_hub(whole: Fragment, image_root: str | None) -> list[Fragment]:
    """The fragments of a dataset on the Hub, if there is no file or folder of this name.

    Unless `image_root` is set, rows may name images among the dataset's own files in the download cache.
    """
    missing = f"{whole.shown_path}: no such file or folder"
    if (
        scheme(whole.path)
        or suffix(whole.shown_path) in {*FORMAT_OF_SUFFIX, ".txt", ".tar"}
        or not HUB_NAME.fullmatch(whole.shown_path)
    ):
        raise DataError(missing)
    owner = whole.shown_path.partition("/")[0]
    if (
        owner != whole.shown_path
        and filesystem(owner)[0].get_file_info(absolute(owner)).type == fs.FileType.Directory
    ):
        raise DataError(f"{missing} in {owner}/")
    import datasets

    own = replace(whole.rules, root=dataset_folder(whole.shown_path), more_roots=(extracted_folder(),))
    rules = whole.rules if image_root else own
    try:
        return _scan_dataset(replace(whole, format="hub", path=whole.shown_path, rules=rules))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{missing} here, and no Hugging Face dataset of that name could be loaded: {one_line(error)}"
        ) from error


def _scan_dataset(whole: Fragment) -> list[Fragment]:
    splits, notes = load_splits(whole.path, whole.shown_path, from_hub=whole.format == "hub")
    fragments = []
    for name, data in splits.items():
        _check_columns(data.column_names, whole)
        unused = unread_columns(
            data.features.arrow_schema, whole.group_by, len(data), whole.shown_path, whole.columns.read
        )
        of_split = replace(whole, dataset_split=name, split=split_of_name(name), version=fingerprint_of(data))
        fragments += [
            replace(
                of_split,
                start=start,
                stop=min(start + ROWS_PER_FRAGMENT, len(data)),
                first_number=start,
                unused=() if start else unused,
            )
            for start in range(0, len(data), ROWS_PER_FRAGMENT)
        ]
    if not fragments:
        raise DataError(f"{whole.shown_path} has no rows: nothing to learn from")
    schema = next(iter(splits.values())).features.arrow_schema
    return [replace(fragments[0], reading_notes=(*notes, *_class_notes(schema, whole))), *fragments[1:]]


def _class_notes(schema: pa.Schema, whole: Fragment) -> tuple[str, ...]:
    read = readable_columns(schema, whole.group_by, whole.columns.read)
    return notes_on(class_names(schema), read)


def _found(whole: Fragment, entries: list[fs.FileInfo]) -> PathContents:
    seen = sorted((entry.base_name, entry.type) for entry in entries if entry.base_name[0] not in "._")
    return PathContents(
        whole,
        files=tuple(name for name, kind in seen if kind == fs.FileType.File),
        folders=tuple(name for name, kind in seen if kind == fs.FileType.Directory),
    )


def _no_rows(whole: Fragment) -> list[Fragment]:
    raise DataError(
        f"{whole.shown_path} holds answers without their questions: give the file with the questions"
    )


def _check_columns(names: list[str], whole: Fragment) -> None:
    whole.columns.check(names, whole.shown_path)
    if whole.group_by and whole.group_by not in names:
        raise DataError(
            f"--group_by {whole.group_by}: {whole.shown_path} has no such column; it has: {', '.join(names)}"
        )


def _check_image_root(path: str, flag_value: str) -> None:
    system, inner = filesystem(path)
    if system.get_file_info(inner).type != fs.FileType.Directory:
        raise DataError(f"--image_root {flag_value}: no such folder")


def _inside(whole: Fragment, name: str) -> Fragment:
    return replace(whole, path=join(whole.path, name), shown_path=f"{whole.shown_path}/{name}")


def _below(whole: Fragment, names: list[str]) -> str:
    """A hint if a subfolder holds data files, such as ", but annotations/ holds train.jsonl"."""
    system, inner = filesystem(whole.path)
    for entry in system.get_file_info([f"{inner}/{name}" for name in sorted(names)[:FOLDERS_LOOKED_AT]]):
        if entry.type == fs.FileType.Directory and not entry.base_name.startswith((".", "_")):
            inside = [file.base_name for file in system.get_file_info(fs.FileSelector(entry.path))]
            if files := sorted(name for name in inside if suffix(name) in FORMAT_OF_SUFFIX):
                return (
                    f", but {entry.base_name}/ holds {files[0]}: give --data_path "
                    f"{whole.shown_path}/{entry.base_name} --image_root {whole.shown_path}"
                )
    return ""


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(sorted(names)[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
