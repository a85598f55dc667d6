"""The cache folder of prepared stores: find one, make one, keep within a size.

CACHE_DIR/<key>.<run>/         a finished store, see `store.py`; `used` in it is touched whenever a run takes
it
CACHE_DIR/<key>.<run>.part/    one that is being made, or was when its maker was killed
"""

import time
import uuid
from collections.abc import Iterator

import pyarrow.fs as pafs

from vlmtune.data.prepare import Source, fingerprint, make
from vlmtune.data.processor import load_processor
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.storage import filesystem

USED = "used"
KEPT_SECONDS = 24 * 3600  # a store is never deleted so soon after its last use: a search may still read it
PART = ".part"


def prepare(source: Source, cache_dir: str, *, size_gb: float | None = None) -> Store:
    """The prepared store of `source`, if it can be trained on as `source` says.

    Args:
        cache_dir: folder or URI that every worker can reach.
        size_gb: see `keep_within`.

    Raises:
        DataError: bad rows with `on_bad_row="error"`, no rows at all, a split that would be empty.
        ModelError: a processor that cannot be loaded.
    """
    store = find_or_make(source, cache_dir, size_gb=size_gb)
    if (refusal := store.refusal(source.on_bad_row)) is not None:
        raise DataError(refusal)
    return store


def find_or_make(source: Source, cache_dir: str, *, size_gb: float | None = None) -> Store:
    """The prepared store of `source` under `cache_dir`, whether it can be trained on or not: see
    `Store.refusal`.

    It is found there by its key, and used if the image files that its rows name are as they were; else it is
    made by Ray Data and then
    put there in one move. Raises DataError where the data as a whole cannot be read, and ModelError.
    """
    pieces = source.pieces()
    processor = load_processor(
        source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    key = fingerprint(source, pieces, processor)
    cache, inner = filesystem(cache_dir)
    cache.create_dir(inner, recursive=True)
    stores = (
        Store(folder)
        for folder in sorted(_folders(cache_dir))
        if f"/{key}." in folder and Store.exists(folder)
    )
    store = next((store for store in stores if store.images_unchanged()), None)
    if store is None:
        making = f"{cache_dir}/{key}.{uuid.uuid4().hex[:8]}{PART}"
        cache.create_dir(filesystem(making)[1])
        try:
            make(source, pieces, processor, making, key)
            # Two runs that prepare the same data at once end in two names for the same rows: either is right.
            made = making.removesuffix(PART)
            cache.move(filesystem(making)[1], filesystem(made)[1])
        finally:
            if cache.get_file_info(filesystem(making)[1]).type == pafs.FileType.Directory:
                cache.delete_dir(filesystem(making)[1])
        store = Store(made)
    with cache.open_output_stream(f"{filesystem(store.folder)[1]}/{USED}"):
        pass
    if size_gb is not None:
        keep_within(cache_dir, size_gb)
    return store


def keep_within(cache_dir: str, size_gb: float) -> None:
    """Delete what has not been used for longest until the cache holds at most `size_gb` (2**30 bytes),
    whatever is left of killed runs too.

    What was used within the last day stays, even above the size.
    """
    cache, _ = filesystem(cache_dir)
    sizes = {folder: _size_and_use(cache, filesystem(folder)[1]) for folder in _folders(cache_dir)}
    total = sum(size for size, _ in sizes.values())
    for folder, (size, used) in sorted(sizes.items(), key=lambda entry: entry[1][1]):
        if total <= size_gb * 2**30 or time.time() - used < KEPT_SECONDS:
            return
        cache.delete_dir(filesystem(folder)[1])
        total -= size


def _folders(cache_dir: str) -> Iterator[str]:
    """The stores, finished or not. Other things in the folder are not ours."""
    cache, inner = filesystem(cache_dir)
    for entry in cache.get_file_info(pafs.FileSelector(inner)):
        key, _, run = entry.base_name.removesuffix(PART).partition(".")
        if entry.type == pafs.FileType.Directory and len(key) == 24 and len(run) == 8:
            yield f"{cache_dir}/{entry.base_name}"


def _size_and_use(cache: pafs.FileSystem, inner: str) -> tuple[int, float]:
    """(bytes, time of the last change in seconds) of a folder; `used` is changed at every use."""
    files = [
        entry
        for entry in cache.get_file_info(pafs.FileSelector(inner, recursive=True))
        if entry.type == pafs.FileType.File
    ]
    return sum(entry.size for entry in files), max((entry.mtime_ns / 1e9 for entry in files), default=0.0)
