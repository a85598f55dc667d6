"""Where data and images lie: local paths and URIs behind one interface, and which image paths a data file may name."""

import posixpath
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs


class RowError(ValueError):
    """What is wrong with one row, as a plain reason without the row's place. The other rows are not affected."""


def scheme(path: str) -> str:
    """The lower-case scheme of a URI (`s3`, `file`, `https`, `data`); an empty string for a plain path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", path) or re.match(r"(data):", path, re.IGNORECASE)
    return found.group(1).lower() if found else ""


def absolute(path: str) -> str:
    """A plain path or `file://` URI as an absolute local path, right in any working directory; other URIs as they are.

    Raises ValueError for a `file://` URI that names another host.
    """
    if scheme(path) == "file":
        parts = urlsplit(path)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"file URI names the host {parts.netloc!r}; write file:///path")
        return posixpath.normpath(unquote(parts.path))
    return path.rstrip("/") if scheme(path) else posixpath.abspath(posixpath.expanduser(path))


def join(folder: str, name: str) -> str:
    """`name`, a plain relative path, below `folder`, an absolute path or a URI (whose `?options` stay at the end)."""
    if not scheme(folder):
        return posixpath.join(folder, name)
    base, _, options = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}" + (f"?{options}" if options else "")


def parent(path: str) -> str:
    """The folder of an absolute path or URI."""
    base, _, options = path.partition("?")
    return posixpath.dirname(base) + (f"?{options}" if options else "") if scheme(path) else posixpath.dirname(path)


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path inside it.

    Raises ValueError or NotImplementedError for a scheme that pyarrow does not know, OSError where the service cannot be reached.
    """
    if scheme(path) in ("", "file"):
        return fs.LocalFileSystem(), absolute(path)
    parts = urlsplit(path)
    service, prefix = _service(f"{parts.scheme}://{parts.netloc}/" + (f"?{parts.query}" if parts.query else ""))
    return service, f"{prefix.rstrip('/')}/{unquote(parts.path).lstrip('/')}".rstrip("/")


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=64)
def _service(uri: str) -> tuple[fs.FileSystem, str]:
    """Kept, because opening one may cost a network request (the region of an S3 bucket)."""
    service, prefix = fs.FileSystem.from_uri(uri)
    return service, prefix


@dataclass(frozen=True)
class ImageRules:
    """Which images a row may name. `root`: the absolute path or URI that relative paths start from and that none may leave."""

    root: str
    allow_outside_paths: bool = False
    allow_remote_images: bool = False

    def resolve(self, reference: str) -> str:
        """The absolute local path or URI that `reference`, as written in a row, stands for. It need not exist.

        Raises RowError where it is no path, and where it leaves `root` (`..`, an absolute path, a symbolic link) or is remote unasked.
        """
        if not reference.strip():
            raise RowError("image path is empty: leave the field out where a row has no image")
        if "\0" in reference or any("\ud800" <= letter <= "\udfff" for letter in reference):
            raise RowError(f"image path {reference!r} holds characters that no file name has")
        kind = scheme(reference)
        if kind == "data":
            raise RowError("image is a data: URI: save the picture as a file and name its path")
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
            raise error if isinstance(error, RowError) else RowError(f"image {reference!r}: {error}") from error
        return self._resolve_local(reference)

    def _resolve_local(self, reference: str) -> str:
        if scheme(self.root):
            real, inside = posixpath.realpath(reference), False
        else:
            root = posixpath.realpath(self.root)
            real = posixpath.realpath(posixpath.join(self.root, reference))
            inside = real.startswith(root.rstrip("/") + "/")
        if not inside and not self.allow_outside_paths:
            raise RowError(self._leaves(reference))
        return real

    def _resolve_remote(self, reference: str) -> str:
        root = urlsplit(self.root)
        given = urlsplit(reference) if scheme(reference) else root._replace(path=f"{root.path}/{quote(reference)}")
        path = posixpath.normpath("/" + unquote(given.path).lstrip("/"))
        same_service = (given.scheme.lower(), given.netloc) == (root.scheme.lower(), root.netloc)
        if same_service and path.startswith(unquote(root.path).rstrip("/") + "/"):
            return root._replace(path=quote(path)).geturl()
        if given.scheme.lower() != root.scheme.lower() and not self.allow_remote_images:
            raise RowError(f"image {reference} is remote: copy it to the data, or give --allow_remote_images")
        if given.scheme.lower() == root.scheme.lower() and not self.allow_outside_paths:
            raise RowError(self._leaves(reference))
        return given._replace(path=quote(path)).geturl()

    def _leaves(self, reference: str) -> str:
        return (
            f"image path {reference} leaves the folder {self.root}: move the image there, set --image_root, or give --allow_outside_paths"
        )
