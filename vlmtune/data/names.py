"""Names of files: which suffixes are images, and which spellings mean the same file."""

import re
import unicodedata

# Files that `images.load_image` opens. HEIC needs the package pillow-heif; without it, its rows are bad rows.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".mpo", ".heic", ".heif"),
)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
# Files that Finder, Explorer and editors leave in folders.
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
MAX_NAME = 1024  # characters of a path; a longer text is no file name


def same_name(name: str) -> str:
    """A key that is equal for different spellings of one name.

    It ignores case and Unicode form (macOS writes NFD), and treats a backslash as a slash.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def is_system_file(name: str) -> bool:
    """Whether a program, not a person, made this file."""
    return name.startswith((".", "~$", "__MACOSX")) or name.lower() in SYSTEM_FILES


def names_image(value: object) -> bool:
    """Whether a value looks like the path of an image, by its suffix."""
    return _has_suffix(value, IMAGE_SUFFIXES)


def names_video(value: object) -> bool:
    """Whether a value looks like the path of a video, by its suffix."""
    return _has_suffix(value, VIDEO_SUFFIXES)


def _has_suffix(value: object, suffixes: tuple[str, ...]) -> bool:
    if not isinstance(value, str) or len(value) > MAX_NAME or "\n" in value:
        return False
    return value.partition("?")[0].strip().lower().endswith(suffixes)
