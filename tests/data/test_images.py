"""Image files of every kind come out upright and RGB, or are refused with their reason."""

import http.server
import io
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmtune.data.images import ImageError, content_hash, load_image

GRADIENT = Image.fromarray(np.linspace(0, 255, 40 * 20).reshape(20, 40).astype(np.uint8))
COLOURS = Image.merge("RGB", [GRADIENT, GRADIENT.transpose(Image.Transpose.ROTATE_180), GRADIENT])


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def far(first: Image.Image, second: Image.Image) -> int:
    """The largest difference of any channel of any pixel."""
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


def half_clear() -> Image.Image:
    image = Image.new("RGBA", (20, 10), (200, 0, 0, 255))
    image.paste((200, 0, 0, 0), (0, 0, 10, 10))
    return image


def deep_png() -> bytes:
    """A grey PNG of 16 bits: 0, then 65535, then the middle."""
    pixels = np.zeros((8, 12), np.uint16)
    pixels[:, 4:8], pixels[:, 8:] = 65535, 32768
    return encoded(Image.fromarray(pixels), "PNG")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned(orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (20, 10), "blue"), form, exif=exif)


@pytest.mark.parametrize(
    ("form", "options", "slack"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("PPM", {}, 0),
        ("JPEG", {"quality": 95}, 60),
    ],
)
def test_every_file_format_gives_the_pixels(
    form: str, options: dict[str, Any], slack: int, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.extension"
    path.write_bytes(encoded(COLOURS, form, **options))
    image = load_image(str(path))
    assert image.mode == "RGB"
    assert image.size == (40, 20)
    assert far(image, COLOURS) <= slack
    assert hashed(load_image(path.as_uri())) == hashed(image)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = load_image(deep_png())
    assert [image.getpixel((x, 0)) for x in (0, 4, 8)] == [(0, 0, 0), (255, 255, 255), (127, 127, 127)]


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_sixteen_bit_files_keep_their_shades(form: str) -> None:
    deep = Image.fromarray(np.asarray(GRADIENT).astype(np.uint16) * 257)
    assert far(load_image(encoded(deep, form)), GRADIENT.convert("RGB")) <= 1


def test_grey_and_one_bit() -> None:
    assert far(load_image(encoded(GRADIENT, "PNG")), GRADIENT.convert("RGB")) == 0
    bits = GRADIENT.convert("1")
    assert set(load_image(encoded(bits, "PNG")).tobytes()) == {0, 255}


def test_cmyk_jpeg_keeps_its_colours() -> None:
    image = load_image(encoded(Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK"), "JPEG", quality=95))
    assert far(image, Image.new("RGB", (16, 16), (250, 20, 20))) < 20


@pytest.mark.parametrize("kind", ["RGBA", "palette", "grey", "colour key"])
def test_transparent_parts_are_white(kind: str) -> None:
    image = half_clear()
    if kind == "RGBA":
        data = encoded(image, "PNG")
    elif kind == "palette":
        data = encoded(image.quantize(8), "PNG")
    elif kind == "grey":
        data = encoded(image.convert("LA"), "PNG")
    else:
        opaque = Image.new("RGB", (20, 10), (200, 0, 0))
        opaque.paste((0, 255, 0), (0, 0, 10, 10))
        data = encoded(opaque, "PNG", transparency=(0, 255, 0))
    loaded = load_image(data)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((2, 2)) == (255, 255, 255)
    red, green, _ = loaded.getpixel((15, 5))
    assert red == 200 if kind != "grey" else red == green < 100


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "green", "blue")]
    data = encoded(
        frames[0],
        form,
        save_all=True,
        append_images=frames[1:],
        duration=50,
        **({"lossless": True} if form == "WEBP" else {}),
    )
    assert far(load_image(data), frames[0]) <= 2


def test_mpo_gives_its_first_image() -> None:
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "blue")]
    image = load_image(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert far(image, frames[0]) < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    base = Image.new("RGB", (32, 16), "white")
    base.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encoded(base, "JPEG", quality=95, exif=exif))
    corner = {1: (2, 2), 2: (29, 2), 3: (29, 13), 4: (2, 13), 5: (2, 2), 6: (13, 2), 7: (13, 29), 8: (2, 29)}[
        orientation
    ]
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    red, green, _ = image.getpixel(corner)
    assert red > 200
    assert green < 60


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once_in_other_formats(form: str) -> None:
    assert load_image(turned(6, form)).size == (10, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_does_not_spoil_the_image() -> None:
    data = encoded(
        Image.new("RGB", (20, 10), "blue"), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage"
    )
    assert load_image(data).size == (20, 10)


PNG = encoded(COLOURS, "PNG")
JPEG = encoded(COLOURS.resize((200, 100)), "JPEG")
REFUSED = {
    "empty": (b"", "the file is empty (0 bytes)"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated or damaged"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated or damaged"),
    "truncated GIF": (encoded(COLOURS, "GIF")[:-300], "truncated or damaged"),
    "JPEG header only": (JPEG[:12], "a JPEG with a broken header"),
    "damaged PNG": (PNG[:60] + b"\x00\x00\x00" + PNG[63:], "truncated or damaged"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "PDF": (b"%PDF-1.7 ...", "a PDF"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "a PostScript file"),
    "ZIP": (b"PK\x03\x04....", "a ZIP archive"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "HEIC": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "it is HEIC"),
    "video": (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "it is a video"),
    "text": (b"hello there, no image", "not an image"),
    "bomb": (png_of_size(30_000, 30_000), "decompression bomb"),
    "large": (png_of_size(12_000, 9_000), "12000×9000 pixels are more than the limit of 100,000,000"),
    "zero size": (b"P6 0 10 255 ", "not an image"),
    "1×1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1×1 pixels: too small to show anything"),
    "3 high": (encoded(Image.new("RGB", (40, 3)), "PNG"), "40×3 pixels: too small to show anything"),
    "ribbon": (
        encoded(Image.new("RGB", (805, 4)), "PNG"),
        "805×4 pixels: one side is over 200 times the other",
    ),
    "float TIFF": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "32-bit numbers without a known range"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("stored", ["file", "bytes"])
def test_refused_with_a_reason(case: str, stored: str, tmp_path: Path) -> None:
    data, reason = REFUSED[case]
    (tmp_path / "image.png").write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(str(tmp_path / "image.png") if stored == "file" else data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_size_limits_are_inclusive() -> None:
    assert load_image(encoded(Image.new("RGB", (800, 4)), "PNG")).size == (800, 4)
    assert load_image(encoded(Image.new("RGB", (4, 4)), "PNG")).size == (4, 4)
    assert load_image(PNG, max_pixels=800).size == (40, 20)
    with pytest.raises(ImageError, match="more than the limit of 799"):
        load_image(PNG, max_pixels=799)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no such file"):
        load_image(str(tmp_path / "none.png"))
    with pytest.raises(ImageError, match="it is a folder, not a file"):
        load_image(str(tmp_path))
    with pytest.raises(ImageError, match=r"cannot be opened: .*filesystem"):
        load_image("foo://bucket/a.png")


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damage_anywhere_is_an_image_error_or_an_image() -> None:
    """Flipped bytes may still give an image; they never give another kind of exception."""
    generator = random.Random(0)
    forms = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF")
    refused = 0
    for data in (encoded(COLOURS, form) for form in forms):
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(generator.choice((1, 4, 40))):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                assert load_image(bytes(damaged), max_pixels=10**6).mode == "RGB"
            except ImageError:
                refused += 1
    assert refused > 50


def hashed(image: Image.Image) -> str:
    return content_hash(np.asarray(image))


def test_content_hash_follows_pixels_only() -> None:
    same = {
        hashed(load_image(encoded(COLOURS, form, **options)))
        for form, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}))
    }
    assert len(same) == 1
    assert len(same.pop()) == 32
    other = COLOURS.copy()
    other.putpixel((39, 19), (0, 0, 1))
    grey, wide = Image.new("RGB", (6, 4), "grey"), Image.new("RGB", (6, 4))
    hashes = {
        hashed(image) for image in (COLOURS, other, grey, wide, wide.resize((4, 6)), wide.resize((8, 3)))
    }
    assert len(hashes) == 6


def test_content_hash_is_what_it_was() -> None:
    """Splits follow from it: another value would move rows from training to test."""
    y, x = np.mgrid[0:33, 0:57]
    pixels = np.stack([x * 4, y * 7, x * y % 256], axis=-1).astype(np.uint8)
    assert content_hash(pixels) == "6ba993d54bfee4dd841157b43887e6f5"


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = {"/a.png": PNG, "/page": b"<html>gone</html>", "/big": bytes(20_000)}.get(self.path)
        self.send_response(200 if answer else 404)
        self.end_headers()
        self.wfile.write(answer or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("vlmtune.data.download.public_reason", lambda _: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_image_from_a_web_server(site: str) -> None:
    assert hashed(load_image(f"{site}/a.png")) == hashed(COLOURS)
    for path, reason in (("none", "the download failed: the server answers 404"), ("page", "a web page")):
        with pytest.raises(ImageError, match=reason):
            load_image(f"{site}/{path}")
    with pytest.raises(ImageError, match=r"the download failed: it is larger than 0\.008 MB"):
        load_image(f"{site}/big", max_pixels=1000)


def test_web_server_that_is_not_there(site: str) -> None:
    with pytest.raises(ImageError, match=r"the download failed: .*refused"):
        load_image("http://127.0.0.1:9/a.png", timeout=2)
