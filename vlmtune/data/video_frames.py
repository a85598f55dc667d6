"""Reads some frames of a video file at even distances, upright and as RGB."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import numpy as np
import xxhash

from vlmtune.data.fragment import open_file
from vlmtune.data.image_limits import MAX_PIXELS, MAX_ROW_PIXELS
from vlmtune.data.images import ImageError
from vlmtune.errors import ConfigError
from vlmtune.storage import one_line

MAX_FRAMES_IN_FILE = 200_000  # two hours at 25 frames a second; all frames before the last one are decoded
MIN_PRESENT = 0.9  # share of the frames in the header that an undamaged file has at least
DEFAULT_RATE = 24.0  # frames a second, if the file does not say


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes:
        frames: `[N, H, W, 3]` uint8.
        indices: the number of each frame in the file.
        total: number of frames in the file.
        rate: frames per second of the file.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    total: int
    rate: float

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that a transformers processor needs for a video whose frames are already chosen."""
        return {
            "total_num_frames": self.total,
            "fps": self.rate,
            "frames_indices": list(self.indices),
            "duration": self.total / self.rate,
            "width": self.frames.shape[2],
            "height": self.frames.shape[1],
            "video_backend": "pyav",
        }

    @property
    def content_hash(self) -> str:
        """32 hex digits, equal for equal frames."""
        digest = xxhash.xxh3_128(f"video {self.frames.shape} ".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return str(digest.hexdigest())


def check_installed() -> None:
    """Raises ConfigError where PyAV, which reads videos, is missing."""
    if find_spec("av") is None:
        raise ConfigError('--video_frames needs PyAV, which is not installed: pip install "vlmtune[video]"')


def load_video(path: str, frames: int) -> Video:
    """Frames of a video at even distances, including the first and the last one; all frames if it is short.

    Args:
        path: an absolute path or a URI that pyarrow opens.
        frames: number of frames.

    Raises:
        ImageError: the file is missing, damaged or not a video, or its frames are too many or too large.
    """
    try:
        total, rate = _length(path)
        if not total:
            raise ImageError("the video has no frames")
        if total > MAX_FRAMES_IN_FILE:
            raise ImageError(f"it has {total:,} frames, and {MAX_FRAMES_IN_FILE:,} are allowed: cut it")
        wanted = frame_numbers(total, frames)
        decoded = _decode(path, wanted)
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except PermissionError as error:
        raise ImageError("the file may not be read: its permissions forbid it") from error
    if len(decoded) < max(1, len(wanted) - 1):  # a last packet may hold no frame of its own
        raise ImageError(f"the video is damaged: {len(decoded)} of {len(wanted)} frames can be decoded")
    indices = wanted[: len(decoded)]
    return Video(np.stack(decoded), tuple(indices), total, rate)


def frame_numbers(total: int, frames: int) -> list[int]:
    """The numbers of `frames` frames at even distances among `total`; all if there are not more."""
    if total <= frames:
        return list(range(total))
    return [int(number) for number in np.linspace(0, total - 1, frames).round()]


def _length(path: str) -> tuple[int, float]:
    """(number of frames, counted without decoding them; frames per second)."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate: Fraction | None = stream.average_rate
        packets = sum(packet.size > 0 for packet in container.demux(stream))
        if packets < MIN_PRESENT * stream.frames:
            raise ImageError(
                f"the video is truncated: its header tells of {stream.frames:,} frames, and {packets:,} are "
                "there"
            )
    return packets, float(rate) if rate else DEFAULT_RATE


def _decode(path: str, wanted: Sequence[int]) -> list[np.ndarray]:
    """The frames with these numbers, up to where the file can be decoded."""
    found: list[np.ndarray] = []
    places, last = set(wanted), wanted[-1]
    with _opened(path) as container:
        stream = container.streams.video[0]
        size = stream.width * stream.height
        if size > MAX_PIXELS or size * len(wanted) > MAX_ROW_PIXELS:
            raise ImageError(
                f"{len(wanted)} frames of {stream.width}×{stream.height} pixels are more than the "
                f"{MAX_ROW_PIXELS:,} pixels that a row may have: make the video smaller, or give fewer "
                "--video_frames"
            )
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in places:
                pixels = frame.to_ndarray(format="rgb24")
                found.append(np.rot90(pixels, k=round(frame.rotation / 90) % 4))
            if number >= last:
                break
    return found


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file as PyAV opens it, with at least one video stream.

    Raises:
        ImageError: it is no video, or it is damaged.
    """
    import av

    with open_file(path) as file:
        try:
            with av.open(file, metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise ImageError("the file has no video in it")
                yield container
        except av.FFmpegError as error:
            raise ImageError(f"not a video that can be read: {error.strerror or one_line(error)}") from error
