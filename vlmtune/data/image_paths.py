"""Which image paths a data file may name."""

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from vlmtune.data.image_search import find_image, missing_hint
from vlmtune.data.names import WINDOWS_DRIVE
from vlmtune.errors import DataError
from vlmtune.storage import absolute, scheme

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_NAME_BYTES = 255  # of a file or folder, on every usual file system
MAX_REFERENCE = 4096  # characters: the longest path that Linux opens
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
SHOWN_CHARACTERS = 60  # of a text that is not a path, in a message


class RowError(ValueError):
    """One row is wrong. The message is the reason without the row's place; other rows are not affected."""


@dataclass(frozen=True)
class ImagePlace:
    """Where an image of a row is.

    Attributes:
        path: an absolute local path or URI.
        note: how it was found, if it is not at the path that the row names.
        found_by_name: it was found by its file name alone, so any path with that file name would lead to it.
        hint: what to do, if there is no such file.
    """

    path: str
    note: str | None = None
    found_by_name: bool = False
    hint: str | None = None


@dataclass(frozen=True)
class ImageRules:
    """Which images a row may name. The fields are part of the prepared store's key.

    Attributes:
        root: the absolute path or URI that relative paths start from, and that no path may leave.
        more_roots: local folders that absolute paths may also lead into.
    """

    root: str
    allow_outside_paths: bool = False
    allow_remote_images: bool = False
    more_roots: tuple[str, ...] = ()

    def locate(self, reference: str) -> ImagePlace:
        """The place of an image: the path from `resolve` or, if no file is there, from `find_image`.

        Raises:
            RowError: see `resolve`.
        """
        if scheme(reference) or scheme(self.root):
            return ImagePlace(self.resolve(reference))
        outside = None
        _check_length(reference)
        if not WINDOWS_DRIVE.match(reference):
            try:
                place = self.resolve(reference)
                if Path(place).exists():
                    return ImagePlace(place)
            except RowError as error:
                if not reference.startswith("/") or os.path.lexists(reference):
                    raise
                outside = error
        found = find_image(self.root, reference)
        if found is not None:
            return ImagePlace(self.resolve(found.path), found.note, found.found_by_name)
        hint = missing_hint(self.root, reference)
        if outside is not None:
            raise RowError(f"image {reference}: there is no such file, {hint}") from outside
        path = reference if WINDOWS_DRIVE.match(reference) else self.resolve(reference)
        return ImagePlace(path, hint=hint)

    def resolve(self, reference: str) -> str:
        """The absolute local path or URI of `reference`, as a row writes it. The file need not exist.

        Raises:
            RowError: it is no path, it leaves `root` (by `..`, an absolute path or a symbolic link), or it is
                remote and `allow_remote_images` is off.
        """
        if not reference.strip():
            raise RowError("image path is empty: leave the field out where a row has no image")
        if "\0" in reference or any("\ud800" <= letter <= "\udfff" for letter in reference):
            raise RowError(f"image path {reference!r} holds characters that no file name has")
        if len(reference) > MAX_REFERENCE and not reference.startswith("data:"):
            raise RowError(f"image {reference[:40]!r}… has {len(reference):,} characters, which no path has")
        kind = scheme(reference)
        if kind == "data":
            raise RowError("image is a data: URI: save the image as a file and name its path")
        if kind in ("http", "https"):
            if not self.allow_remote_images:
                raise RowError(f"image {reference} is remote: download it, or give --allow_remote_images")
            return reference
        try:
            if kind == "file":
                return self._resolve_local(absolute(reference))
            if kind or (scheme(self.root) and not posixpath.isabs(reference)):
                return self._resolve_remote(reference)
        except ValueError as error:
            if isinstance(error, RowError):
                raise
            raise RowError(f"image {reference!r}: {error}") from error
        return self._resolve_local(reference)

    def _resolve_local(self, reference: str) -> str:
        if scheme(self.root):
            real, inside = posixpath.realpath(reference), False
        else:
            root = posixpath.realpath(self.root)
            real = posixpath.realpath(posixpath.join(self.root, reference))
            roots = (root, *map(posixpath.realpath, self.more_roots))
            inside = any(real.startswith(one.rstrip("/") + "/") for one in roots)
        if not inside and not self.allow_outside_paths:
            raise RowError(self._outside(reference))
        return real

    def _resolve_remote(self, reference: str) -> str:
        root = urlsplit(self.root)
        if scheme(reference):
            image = urlsplit(reference)
        else:
            image = root._replace(path=f"{root.path}/{quote(reference)}")
        path = posixpath.normpath("/" + unquote(image.path).lstrip("/"))
        same_scheme = image.scheme.lower() == root.scheme.lower()
        inside = path.startswith(unquote(root.path).rstrip("/") + "/")
        if same_scheme and image.netloc == root.netloc and inside:
            return root._replace(path=quote(path)).geturl()
        if scheme(reference) and image.query and image.query != root.query:
            # pyarrow's options name servers (endpoint_override), which would be asked with the user's keys.
            raise RowError(f"image {reference} has options behind its '?': leave them out")
        if not same_scheme and not self.allow_remote_images:
            raise RowError(f"image {reference} is remote: copy it to the data, or give --allow_remote_images")
        if same_scheme and not self.allow_outside_paths:
            raise RowError(self._outside(reference))
        return image._replace(path=quote(path)).geturl()

    def _outside(self, reference: str) -> str:
        if not scheme(self.root):
            path = posixpath.normpath(posixpath.join(self.root, reference))
            if path.startswith(self.root.rstrip("/") + "/"):
                return (
                    f"image path {reference} leaves the folder {self.root} through a link to "
                    f"{posixpath.realpath(path)}: give --allow_outside_paths if you trust the link"
                )
        return (
            f"image path {reference} leaves the folder {self.root}: "
            "move the image there, set --image_root, or give --allow_outside_paths"
        )


def _check_length(reference: str) -> None:
    """Raises RowError for a long text that cannot be a path; to search for it would take minutes."""
    shown = f"{reference[:SHOWN_CHARACTERS]}…"
    if len(reference) > MAX_NAME_BYTES and BASE64.fullmatch(reference):
        raise RowError(
            f"image {shown} is base64 text, not a path: save the image as a file and name its path"
        )
    if any(len(part.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES for part in reference.split("/")):
        raise RowError(f"image {shown} is no path: a name in it is longer than {MAX_NAME_BYTES} bytes")


def check_links(folder: str, shown_path: str, rules: ImageRules) -> None:
    """Check that no file of a data folder, except images, is a link to a file outside the folder.

    Otherwise a folder from somebody else could bring any file of this machine into messages and reports.
    Allowed are links of the Hub's download cache, which lead to `blobs/` of the same repository.

    Raises:
        DataError: a file is such a link, and `allow_outside_paths` is off.
    """
    if scheme(folder) or rules.allow_outside_paths:
        return
    real_folder = posixpath.realpath(folder)
    repository = real_folder.partition("/snapshots/")[0]
    allowed = (real_folder + "/", *([f"{repository}/blobs/"] if repository != real_folder else []))
    with os.scandir(folder) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink() and entry.is_file())
    for name in links:
        is_image = name.lower().endswith(IMAGE_SUFFIXES)  # checked by `ImageRules` when a row names it
        if not is_image and not posixpath.realpath(f"{folder}/{name}").startswith(allowed):
            raise DataError(
                f"{shown_path}/{name} is a link to a file outside the folder: copy the file there, or give "
                "--allow_outside_paths"
            )
