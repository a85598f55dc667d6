"""Which image paths a data file may name."""

import posixpath
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from vlmtune.storage import absolute, scheme


class RowError(ValueError):
    """What is wrong with one row: a plain reason without the row's place. Other rows are not affected."""


@dataclass(frozen=True)
class ImageRules:
    """Which images a row may name. The fields are part of the prepared store's key.

    Attributes:
        root: the absolute path or URI that relative paths start from, and that no path may leave.
    """

    root: str
    allow_outside_paths: bool = False
    allow_remote_images: bool = False

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
            inside = real.startswith(root.rstrip("/") + "/")
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
        if not same_scheme and not self.allow_remote_images:
            raise RowError(f"image {reference} is remote: copy it to the data, or give --allow_remote_images")
        if same_scheme and not self.allow_outside_paths:
            raise RowError(self._outside(reference))
        return image._replace(path=quote(path)).geturl()

    def _outside(self, reference: str) -> str:
        return (
            f"image path {reference} leaves the folder {self.root}: "
            "move the image there, set --image_root, or give --allow_outside_paths"
        )
