"""Videos for tests, written with PyAV."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

SIZE = (96, 64)  # width, height


def write_video(path: Path, brightness: Sequence[int], *, rate: int = 10, codec: str = "mpeg4") -> Path:
    """A video whose frames are grey, each of this brightness, with a darker left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"qscale": "2"}
        for value in brightness:
            pixels = np.full((SIZE[1], SIZE[0], 3), value, np.uint8)
            pixels[:, : SIZE[0] // 2] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
