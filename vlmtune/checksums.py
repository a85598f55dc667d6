"""Checksums of a checkpoint's files, so that training does not resume from a truncated or corrupted file."""

import hashlib
import json
from pathlib import Path

import pyarrow.fs as pafs

CHECKSUMS = "checksums.json"
BLOCK = 2**22  # bytes that one call reads


def write_checksums(folder: Path, **texts: str) -> None:
    """Write the checksums of a local folder's files into it.

    Args:
        texts: contents of files that are written later, by file name with "_" in place of ".".
    """
    sums = {
        path.name: [path.stat().st_size, _digest(path)]
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != CHECKSUMS
    }
    for name, text in texts.items():
        content = text.encode()
        sums[name.replace("_", ".")] = [len(content), hashlib.blake2b(content, digest_size=16).hexdigest()]
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def damaged_file(files: pafs.FileSystem, folder: str) -> str | None:
    """The name of a file that is missing or differs from its checksum; None if there is none.

    A folder without checksums counts as undamaged.
    """
    if files.get_file_info(f"{folder}/{CHECKSUMS}").type != pafs.FileType.File:
        return None
    try:
        with files.open_input_stream(f"{folder}/{CHECKSUMS}") as stream:
            sums = json.loads(stream.read())
        names = list(sums)
        if not isinstance(sums, dict) or any("/" in name for name in names):
            return CHECKSUMS
        sizes = {
            info.base_name: info.size for info in files.get_file_info([f"{folder}/{one}" for one in names])
        }
        wrong = [name for name in names if sizes[name] != sums[name][0]]
        wrong += [
            name for name in names if not wrong and _stream_digest(files, folder, name) != sums[name][1]
        ]
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RecursionError,
    ):  # the checksum file itself is damaged
        return CHECKSUMS
    return wrong[0] if wrong else None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stream_digest(files: pafs.FileSystem, folder: str, name: str) -> str:
    total = hashlib.blake2b(digest_size=16)
    with files.open_input_stream(f"{folder}/{name}") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()
