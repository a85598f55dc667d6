"""The cache folder of prepared stores: find one, make one, keep the folder within a size.

CACHE_DIR/<key>.<run>/         a finished store, see `store.py`; each use touches the file `used` in it
CACHE_DIR/<key>.<run>.part/    a store that a run is making, or was making when it was killed
"""

import time
import uuid
from collections.abc import Iterator

import pyarrow.fs as pafs

from vlmtune.data.prepare import make_store
from vlmtune.data.source import DataSource, ScannedData, fingerprint
from vlmtune.data.store import Store
from vlmtune.errors import DataError, writable
from vlmtune.storage import filesystem

USED = "used"
PART = ".part"
KEY_LETTERS, RUN_LETTERS = 24, 8
# A store is never deleted so soon after its last use, because a search may still read it.
SAFE_SECONDS = 24 * 3600


def prepare_store(
    source: DataSource, cache_dir: str, *, size_gb: float | None = None, scanned: ScannedData | None = None
) -> Store:
    """Find or make the prepared store of `source`, and check that it can be trained on.

    Args:
        cache_dir: folder or URI that every worker can reach.
        size_gb: see `keep_within`.
        scanned: the result of `source.scan()`, if the caller has it already.

    Raises:
        DataError: there are no rows, a split would be empty, or rows are bad and `on_bad_row` is "error".
        ModelError: the processor cannot be loaded.
    """
    store = find_or_make_store(source, cache_dir, size_gb=size_gb, scanned=scanned)
    if (reason := store.unusable_reason(source.on_bad_row, source.max_bad_fraction)) is not None:
        raise DataError(reason)
    return store


def find_or_make_store(
    source: DataSource, cache_dir: str, *, size_gb: float | None = None, scanned: ScannedData | None = None
) -> Store:
    """Find or make the prepared store of `source`, even if it cannot be trained on (`Store.unusable_reason`).

    A store in the cache is used if its key fits and the image files of its rows did not change. Otherwise Ray
    Data makes one in a temporary folder, which is then renamed.

    Raises:
        DataError: the data as a whole cannot be read.
        ModelError: the processor cannot be loaded.
    """
    scanned = source.scan() if scanned is None else scanned
    processor = source.model.processor()
    key = fingerprint(source, scanned.fragments, processor)
    cache, inner = filesystem(cache_dir)
    with writable(cache_dir, "--cache_dir"):
        cache.create_dir(inner, recursive=True)
    store = _find(source, cache_dir, key) or _make(source, scanned, processor, cache_dir, key)
    with (
        writable(cache_dir, "--cache_dir"),
        cache.open_output_stream(f"{filesystem(store.folder)[1]}/{USED}"),
    ):
        pass
    if size_gb is not None:
        keep_within(cache_dir, size_gb)
    return store


def keep_within(cache_dir: str, size_gb: float) -> None:
    """Delete stores, also unfinished ones of killed runs, until at most `size_gb` (of 2**30 bytes) remain.

    Those that were used longest ago go first. Stores used within the last day stay, even above that size.
    """
    cache, _ = filesystem(cache_dir)
    sizes = {folder: _size_and_use(cache, filesystem(folder)[1]) for folder in _folders(cache_dir)}
    total = sum(size for size, _ in sizes.values())
    for folder, (size, used) in sorted(sizes.items(), key=lambda entry: entry[1][1]):
        if total <= size_gb * 2**30 or time.time() - used < SAFE_SECONDS:
            return
        cache.delete_dir(filesystem(folder)[1])
        total -= size


def _find(source: DataSource, cache_dir: str, key: str) -> Store | None:
    for folder in sorted(_folders(cache_dir)):
        if f"/{key}." not in folder or not Store.exists(folder):
            continue
        store = Store(folder, model=source.model)
        if (store.meta.key, store.meta.encoded) != (key, source.encoded):
            raise DataError(
                f"prepared rows {folder}/meta.json do not belong to this data and these options: "
                f"delete {folder} to prepare again"
            )
        if store.images_unchanged(source.given_paths):
            return store
    return None


def _make(source: DataSource, scanned: ScannedData, processor: object, cache_dir: str, key: str) -> Store:
    folder = f"{cache_dir}/{key}.{uuid.uuid4().hex[:RUN_LETTERS]}"
    fs, unfinished = filesystem(folder + PART)
    with writable(cache_dir, "--cache_dir"):
        fs.create_dir(unfinished)
    try:
        make_store(source, scanned, processor, folder + PART, key)
        # Two runs that prepare the same data at once make two equal stores, of which later runs use either.
        fs.move(unfinished, filesystem(folder)[1])
    finally:
        if fs.get_file_info(unfinished).type == pafs.FileType.Directory:
            fs.delete_dir(unfinished)
    return Store(folder, model=source.model)


def _folders(cache_dir: str) -> Iterator[str]:
    """The stores, finished or not. Folders with other names belong to somebody else."""
    cache, inner = filesystem(cache_dir)
    for entry in cache.get_file_info(pafs.FileSelector(inner)):
        key, _, run = entry.base_name.removesuffix(PART).partition(".")
        if entry.type == pafs.FileType.Directory and len(key) == KEY_LETTERS and len(run) == RUN_LETTERS:
            yield f"{cache_dir}/{entry.base_name}"


def _size_and_use(cache: pafs.FileSystem, inner: str) -> tuple[int, float]:
    """(size in bytes, time of the last use in seconds) of a store: each use writes its file `used`."""
    files = [
        entry
        for entry in cache.get_file_info(pafs.FileSelector(inner, recursive=True))
        if entry.type == pafs.FileType.File
    ]
    return sum(entry.size for entry in files), max((entry.mtime_ns / 1e9 for entry in files), default=0.0)
