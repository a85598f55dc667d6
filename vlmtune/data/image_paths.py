"""Which image paths a data file may name."""

import posixpath
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from vlmtune.storage import absolute, scheme


class RowError(ValueError):
    """What is wrong with one row, as a plain reason without the row's place. The other rows are not
    affected."""


@dataclass(frozen=True)
class ImageRules:
    """Which images a row may name. `root`: the absolute path or URI that relative paths start from and that
    none may leave."""

    root: str
    allow_outside_paths: bool = False
    allow_remote_images: bool = False

    def resolve(self, reference: str) -> str:
        """The absolute local path or URI that `reference`, as written in a row, stands for. It need not
        exist.

        Raises RowError where it is no path, and where it leaves `root` (`..`, an absolute path, a symbolic
        link) or is remote unasked.
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
            raise (
                error if isinstance(error, RowError) else RowError(f"image {reference!r}: {error}")
            ) from error
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
        given = (
            urlsplit(reference)
            if scheme(reference)
            else root._replace(path=f"{root.path}/{quote(reference)}")
        )
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
        return f"image path {reference} leaves the folder {self.root}: move the image there, set --image_root, or give --allow_outside_paths"
