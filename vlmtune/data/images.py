"""Image files → upright RGB images, or a plain reason why not."""

import io
import os
import struct
import zlib
from functools import cache
from importlib.util import find_spec
from typing import IO, cast

import numpy as np
import xxhash
from PIL import Image

from vlmtune.data.download import DownloadError, download
from vlmtune.data.image_limits import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_ROW_PIXELS,
    scans_reason,
    size_reason,
)
from vlmtune.storage import filesystem, one_line, scheme, special_file

MIN_SIDE = 4  # pixels; a smaller image shows nothing that a model could learn from
MAX_ASPECT = 200
BAND_PIXELS = 4_000_000
READ_AT_ONCE = 16_000_000  # bytes of a file
# Pillow's other readers start programs (EPS) or read office formats, which a data set must not be able to
# cause.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow's decoders raise on damaged bytes.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SCALED = "scaled_from_more_bits"  # key in the `info` of an image that was scaled to 8 bits
NEARLY_BLACK = 32  # of 255
SIGNATURES = (
    (b"\xff\xd8\xff", "a JPEG with a broken header"),
    (b"\x89PNG", "a PNG with a broken header"),
    (b"GIF8", "a GIF with a broken header"),
    (b"RIFF", "a WebP, WAV or AVI that cannot be read"),
    (b"%PDF", "a PDF: save its pages as PNG"),
    (b"%!PS", "a PostScript file: save it as PNG"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<svg", "an SVG drawing: save it as PNG"),
    (b"<?xml", "an XML or SVG file"),
    (b"{", "JSON text"),
)


class ImageError(ValueError):
    """Why an image cannot be used, as a plain reason without its path."""


class TooManyPixelsError(ImageError):
    """An image of more pixels than are allowed."""


class RowPixels:
    """Loads the images of one row and limits the pixels of all of them together."""

    def __init__(self) -> None:
        self.left = MAX_ROW_PIXELS

    def load(self, reference: str | bytes) -> Image.Image:
        """The next image, see `load_image`.

        Raises:
            ImageError: see `load_image`; or the row's images together have more pixels than a row may hold.
        """
        try:
            image = load_image(reference, max_pixels=min(MAX_PIXELS, self.left))
        except TooManyPixelsError as error:
            if self.left >= MAX_PIXELS:
                raise
            raise ImageError(
                f"the row's images have more than {MAX_ROW_PIXELS:,} pixels together: make them smaller"
            ) from error
        self.left -= image.width * image.height
        return image


def load_image(ref: str | bytes, *, max_pixels: int = MAX_PIXELS, timeout: float = 20.0) -> Image.Image:
    """The first frame of an image file, upright (EXIF orientation applied), as RGB with 8 bits a channel.

    Transparent pixels are laid on white. An image of more than 8 bits is scaled from its darkest to its
    brightest value, and its `info` then holds SCALED. HEIC needs the package pillow-heif.

    Args:
        ref: encoded bytes, a path, a URI that pyarrow opens, or an http(s) URL. `ImageRules` decides before
            this whether a row may name it.
        max_pixels: limit, checked before decoding. Pillow's own limit of 179 million pixels applies too.
        timeout: seconds in which a web server has to deliver the whole image, with all redirects.

    Raises:
        ImageError: the file is missing, empty, damaged or no image, or its size is useless or dangerous.
    """
    try:
        with _open(ref, max_bytes=min(8 * max_pixels, MAX_FILE_BYTES), timeout=timeout) as file:
            if (reason := size_reason(file)) is not None:
                raise ImageError(reason)
            return _decode(_in_memory(file), max_pixels)
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except PermissionError as error:
        raise ImageError("the file may not be read: its permissions forbid it") from error


def content_hash(pixels: np.ndarray) -> str:
    """32 hex digits of XXH3 over size and pixels: equal for equal pixels in any file format.

    XXH3 takes 0.02 ms for 640x480 pixels. A cryptographic hash takes 1.4 ms, a fifth of preparing the row.

    Args:
        pixels: `[height, width, 3]` uint8.
    """
    digest = xxhash.xxh3_128(f"RGB {pixels.shape[1]} {pixels.shape[0]} ".encode())
    digest.update(pixels.data)
    return str(digest.hexdigest())


def _open(ref: str | bytes, *, max_bytes: int, timeout: float) -> IO[bytes]:
    if isinstance(ref, bytes):
        return io.BytesIO(ref)
    if scheme(ref) in ("http", "https"):
        try:
            return io.BytesIO(download(ref, max_bytes=max_bytes, seconds=timeout))
        except DownloadError as error:
            raise ImageError(f"the download failed: {error}") from error
    try:
        system, path = filesystem(ref)
        if scheme(ref) in ("", "file") and (kind := special_file(path)) is not None:
            raise ImageError(f"it is {kind}, not a file")
        return cast(IO[bytes], system.open_input_file(path))
    except (FileNotFoundError, PermissionError, ImageError):
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise ImageError(f"the file cannot be opened: {one_line(error)}") from error


def _in_memory(file: IO[bytes]) -> IO[bytes]:
    """A small file read into memory, which saves Pillow's many small reads (0.2 ms); a large file as is.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return io.BytesIO(file.read()) if size <= READ_AT_ONCE else file
    except OSError as error:
        raise ImageError(f"the file cannot be read: {one_line(error)}") from error


def _decode(file: IO[bytes], max_pixels: int) -> Image.Image:
    formats: tuple[str, ...] = FORMATS
    if _is_heif(file) and find_spec("pillow_heif") is not None:
        _register_heif()
        formats = (*FORMATS, "HEIF")
        file = io.BytesIO(file.read())  # libheif reads sizes that pyarrow's files refuse
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(
            f"more pixels than the limit of {max_pixels:,}: it may be a decompression bomb; make it smaller"
        ) from error
    except DAMAGED as error:
        raise ImageError(_describe(file)) from error
    with image:
        _check_size(image.width, image.height, max_pixels)
        if image.format == "JPEG" and (reason := scans_reason(file, image.width * image.height)) is not None:
            raise ImageError(reason)
        deep_colours = image.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in image.tile)
        try:
            image.load()
            rgb, turn = _to_rgb(image), UPRIGHT.get(_orientation(image))
            if deep_colours:
                _check_brightness(rgb)
            upright = rgb if turn is None else rgb.transpose(turn)
            upright.format = image.format  # Pillow's copies forget it
            if _is_deep(image):
                upright.info[SCALED] = True
            return upright
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError("there is not enough memory to decode it") from error
        except DAMAGED as error:
            raise ImageError(f"the image is truncated or damaged: {one_line(error)}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixelsError(
            f"{width}×{height} pixels are more than the limit of {max_pixels:,}: "
            "it may be a decompression bomb; make it smaller"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width}×{height} pixels: too small to show anything")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{width}×{height} pixels: one side is over {MAX_ASPECT} times the other; crop it")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DAMAGED:  # a broken EXIF block does not make the image bad
        return 1


def _is_heif(file: IO[bytes]) -> bool:
    head = file.read(12)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


@cache
def _register_heif() -> None:
    """Let Pillow open HEIC: once in a process."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return _deep_to_rgb(image)
    if image.has_transparency_data or image.mode == "RGBa":
        return _on_white(image)
    return image.convert("RGB") if image.mode != "RGB" else image


def _on_white(image: Image.Image) -> Image.Image:
    """The image on white, made in bands, because three copies of a whole image would take a gigabyte more."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return rgb


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """A gray image of 16 bits, scaled from its darkest to its brightest value.

    Pillow's own conversion clips the values, which makes most of the image white. Dividing by 65535 would
    make an image of 12 bits nearly black, and the few degrees of a thermal image a single gray.
    """
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if image.mode == "F" or low < 0 or high > 65535:
        raise ImageError("its pixels are 32-bit numbers without a known range: save it with 8 or 16 bits")
    if low == high:
        low, high = 0, 65535
    scaled = (pixels.astype(np.uint32) - low) * 255 // (high - low)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _check_brightness(image: Image.Image) -> None:
    """Refuse 16-bit colors that only use the lower 12 bits: Pillow keeps the upper 8 bits, nearly black."""
    brightest = max(high for _, high in cast(tuple[tuple[int, int], ...], image.getextrema()))
    if 0 < brightest < NEARLY_BLACK:
        raise ImageError("its 16-bit colours use only the lowest values, as of 12 bits: save it with 8 bits")


def _describe(file: IO[bytes]) -> str:
    """What a file that Pillow does not know looks like, from its first bytes."""
    file.seek(0)
    head = file.read(64)
    if not head:
        return "the file is empty (0 bytes)"
    if head[4:8] == b"ftyp":
        if head[8:12] in HEIF_BRANDS:
            return (
                "not an image that can be read yet: it is HEIC; pip install pillow-heif, or save it as JPEG"
            )
        return "not an image: it is a video"
    for signature, name in SIGNATURES:
        if head.lstrip().lower().startswith(signature.lower()):
            return f"not an image that can be read: it looks like {name}"
    return "not an image"  # its content is not quoted: a path may name any file
