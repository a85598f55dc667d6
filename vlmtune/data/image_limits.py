"""Limits of the size of one image and of all images of a row, because data files may come from anybody.

A row that exceeds a limit is a bad row with a reason. SECURITY.md lists the limits.
"""

import os
from typing import IO

MAX_PIXELS = 100_000_000  # of an image, which takes about a gigabyte while it is decoded
MAX_ROW_PIXELS = 200_000_000  # of all images of a row
MAX_FILE_BYTES = 200_000_000  # of an image as it is stored
# A progressive JPEG is decoded once for each of its scans. Cameras and editors write some ten of them.
MAX_SCANS = 64
MAX_SCANNED_PIXELS = 1_500_000_000
START_OF_SCAN = b"\xff\xda"  # a JPEG marker; these bytes never occur inside compressed data


def size_reason(file: IO[bytes]) -> str | None:
    """Why a file is too large to be an image; None if it is not."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > MAX_FILE_BYTES:
        return f"the file has {size / 1e6:,.0f} MB, and {MAX_FILE_BYTES // 10**6} are allowed"
    return None


def scans_reason(file: IO[bytes], pixels: int) -> str | None:
    """Why a JPEG would take too long to decode; None if it would not."""
    file.seek(0)
    scans = file.read().count(START_OF_SCAN)
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
        return f"a JPEG of {scans} scans, which takes minutes to decode: save it anew"
    return None
