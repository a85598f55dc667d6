"""What one image, and the images of one row, may take."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.data import image_limits, images
from vlmtune.data.examples import load_images
from vlmtune.data.images import ImageError, content_hash, load_image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    start = time.monotonic()
    for path, kind in (
        (tmp_path / "pipe.png", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ImageError, match=f"it is {kind}, not a file"):
            load_image(str(path))
    assert time.monotonic() - start < 1


def with_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan stands there `number` times."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), "JPEG", progressive=True)
    last = content.rindex(image_limits.START_OF_SCAN)
    return content[:last] + content[last:-2] * number + content[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    load_image(with_scans(1))
    start = time.monotonic()
    with pytest.raises(ImageError, match="a JPEG of 3009 scans"):
        load_image(with_scans(3000))
    assert time.monotonic() - start < 1


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(image_limits.MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match="the file has 200 MB, and 200 are allowed"):
        load_image(str(path))


def test_the_images_of_a_row_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_ROW_PIXELS", 2_500)
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000)
    image = encoded(Image.new("RGB", (30, 30)), "PNG")
    assert len(load_images([image, image], {})) == 2
    with pytest.raises(ImageError, match=r"the row's images have more than 2,500 pixels together"):
        load_images([image] * 3, {})
    with pytest.raises(ImageError, match=r"40×40 pixels are more than the limit of 1,000"):
        load_images([encoded(Image.new("RGB", (40, 40)), "PNG")], {})


def test_twenty_jpeg_2000_bombs_in_a_row_are_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 200 bytes each, of 16 million pixels."""
    monkeypatch.setattr(images, "MAX_ROW_PIXELS", 30_000_000)
    bomb = encoded(Image.new("L", (8, 8)), "JPEG2000", irreversible=False)
    size = bomb.index(b"\xff\x51") + 6  # of the image, then its tiles: 8 x 8 in the file
    side = (4_000).to_bytes(4, "big")
    patched = bytearray(bomb)
    patched[size : size + 8] = side * 2
    patched[size + 16 : size + 24] = side * 2
    header = patched.find(b"ihdr")
    if header >= 0:
        patched[header + 4 : header + 12] = side * 2
    assert len(patched) < 250 and load_images([bytes(patched)], {})[0].size == (4_000, 4_000)
    with pytest.raises(ImageError, match="the row's images have more than 30,000,000 pixels together"):
        load_images([bytes(patched)] * 20, {})


PEAK = """
import resource, sys
from vlmtune.data.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_image(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_small_png_of_a_hundred_million_pixels_peaks_at_a_gigabyte(tmp_path: Path) -> None:
    """One with transparency, whose layers took 1.7 GB."""
    path = tmp_path / "a.png"
    image = Image.new("P", (9_900, 9_900))
    image.save(path, transparency=0, bits=1)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.1e9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa"])
def test_bands_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode if mode != "P" else "RGBA")
    if mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = 3
    layer = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    monkeypatch.setattr(images, "BAND_PIXELS", 100)
    assert content_hash(np.asarray(images._on_white(image))) == content_hash(np.asarray(whole))


def test_the_limits_are_those_that_security_md_states() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    for value in (
        image_limits.MAX_PIXELS,
        image_limits.MAX_ROW_PIXELS,
        image_limits.MAX_SCANS,
        image_limits.MAX_FILE_BYTES // 10**6,
    ):
        assert f"{value:,}" in text, value
