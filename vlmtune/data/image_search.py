"""Finds an image whose path in the row is spelled differently, or comes from another machine."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from vlmtune.data.names import WINDOWS_DRIVE, same_name

MAX_FILES = 200_000  # listed below the root to find a file by its name
LEVELS_UP = 3  # folders above the root in which an image is looked for, for a hint

BACKSLASHES = "backslashes in image paths are read as slashes"
PERCENT = "%20 and the like in image paths are read as the characters that they stand for"
SPELLING = "images are found under another spelling of their path (upper or lower case, or Unicode form)"
ELSEWHERE = "image paths of another machine are found by their names below the image folder"


@dataclass(frozen=True)
class FoundImage:
    """An image that was found at another path than the one in its row.

    Attributes:
        note: how the paths differ, in general words.
        found_by_name: it was found by its file name alone.
    """

    path: str
    note: str
    found_by_name: bool = False


def find_image(root: str, reference: str) -> FoundImage | None:
    """The one file below a local folder that a reference can mean; None if there is none, or several.

    It lists the folders along the path; for an absolute path of another machine, the whole tree.
    """
    slashes = reference.replace("\\", "/")
    spellings = [(slashes, BACKSLASHES if slashes != reference else SPELLING)]
    if "%" in slashes:
        spellings.append((unquote(slashes), PERCENT))
    for path, note in spellings:
        drive = WINDOWS_DRIVE.match(path)
        if drive or path.startswith("/"):
            found = _below(root, path[drive.end() :] if drive else path)
        else:
            parts = [part for part in path.split("/") if part not in ("", ".")]
            place = _walk(root, parts)
            found = FoundImage(place, note) if place else None
        if found is not None:
            return found
    return None


def missing_hint(root: str, reference: str) -> str:
    """What to do if `find_image` found nothing, as the end of a sentence."""
    name = posixpath.basename(reference.replace("\\", "/"))
    several = len(_files_by_name(root).get(same_name(name), ())) if _is_absolute(reference) else 0
    if several > 1:
        return f"{several} files below {root} are called {name}: write paths from that folder"
    if WINDOWS_DRIVE.match(reference):
        return f"a path of a Windows machine, and no {name} is below {root}: give --image_root"
    if _is_absolute(reference):
        return f"and no {name} is below {root}: give --image_root, the folder that holds the images"
    above = root
    for _ in range(LEVELS_UP):
        above = posixpath.dirname(above)
        if Path(above, reference).exists():
            return f"it is below {above}: give --image_root {above}"
    return f"paths start from {root}; --image_root names another folder"


def _is_absolute(reference: str) -> bool:
    return reference.startswith(("/", "\\\\")) or WINDOWS_DRIVE.match(reference) is not None


def _below(root: str, path: str) -> FoundImage | None:
    """The file below the root that shares the longest path ending with `path`, or at least its file name."""
    parts = [part for part in path.split("/") if part]
    for first in range(1, len(parts) - 1):
        if place := _walk(root, parts[first:]):
            return FoundImage(place, ELSEWHERE)
    named = _files_by_name(root).get(same_name(parts[-1]), ()) if parts else ()
    if len(named) == 1:
        return FoundImage(named[0], ELSEWHERE, found_by_name=True)
    endings = ["/".join(parts[first:]) for first in range(1, len(parts) - 1)]
    for ending in endings:
        fitting = [place for place in named if same_name(place).endswith("/" + same_name(ending))]
        if len(fitting) == 1:
            return FoundImage(fitting[0], ELSEWHERE)
    return None


def _walk(folder: str, parts: list[str]) -> str | None:
    """The file at this path below a folder, in any case and Unicode form; None if none or several fit."""
    for number, part in enumerate(parts):
        if part == "..":
            return None
        place = posixpath.join(folder, part)
        if not Path(place).exists():
            alike = _entries(folder).get(same_name(part), ())
            if len(alike) != 1:
                return None
            place = posixpath.join(folder, alike[0])
        if number < len(parts) - 1 and not Path(place).is_dir():
            return None
        folder = place
    return folder if parts and Path(folder).is_file() else None


@lru_cache(maxsize=1024)
def _entries(folder: str) -> dict[str, tuple[str, ...]]:
    found = defaultdict(list)
    for entry in Path(folder).iterdir():
        found[same_name(entry.name)].append(entry.name)
    return {key: tuple(names) for key, names in found.items()}


@lru_cache(maxsize=4)
def _files_by_name(root: str) -> dict[str, tuple[str, ...]]:
    """Files below a folder by the key of their names; of a very large tree, the first ones found."""
    found = defaultdict(list)
    for number, path in enumerate(_files(root)):
        if number == MAX_FILES:
            break
        found[same_name(posixpath.basename(path))].append(path)
    return {key: tuple(paths) for key, paths in found.items()}


def _files(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (posixpath.join(folder, name) for name in sorted(names))
