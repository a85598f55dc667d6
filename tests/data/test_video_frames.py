"""Frames of videos: which ones, their pixels, and what is said of files that are none."""

import sys
from pathlib import Path

import numpy as np
import pytest
from video_kit import SIZE, write_video

from vlmtune.data import video_frames
from vlmtune.data.images import ImageError
from vlmtune.data.video_frames import check_installed, frame_numbers, load_video
from vlmtune.errors import ConfigError

RAMP = [10 + 12 * number for number in range(20)]


def test_frames_at_even_distances(tmp_path: Path) -> None:
    video = load_video(str(write_video(tmp_path / "a.mp4", RAMP)), 4)
    assert video.indices == (0, 6, 13, 19)
    assert (video.total, video.rate) == (20, 10.0)
    assert video.frames.shape == (4, SIZE[1], SIZE[0], 3)
    right = video.frames[:, :, SIZE[0] // 2 + 4 :].mean((1, 2, 3))
    assert np.abs(right - [RAMP[number] for number in video.indices]).max() < 4
    left = video.frames[:, :, : SIZE[0] // 2 - 4].mean((1, 2, 3))
    assert np.abs(left - right / 2).max() < 4
    assert video.metadata == {
        "total_num_frames": 20,
        "fps": 10.0,
        "frames_indices": [0, 6, 13, 19],
        "duration": 2.0,
        "width": SIZE[0],
        "height": SIZE[1],
        "video_backend": "pyav",
    }


def test_a_short_video_has_all_of_its_frames(tmp_path: Path) -> None:
    assert load_video(str(write_video(tmp_path / "a.avi", RAMP[:3])), 8).indices == (0, 1, 2)
    assert frame_numbers(5, 1) == [0]
    assert frame_numbers(100, 5) == [0, 25, 50, 74, 99]


def test_equal_frames_have_equal_hashes(tmp_path: Path) -> None:
    one, same, other = (
        load_video(str(write_video(tmp_path / name, ramp)), 4)
        for name, ramp in (("a.mp4", RAMP), ("b.mp4", RAMP), ("c.mp4", RAMP[::-1]))
    )
    assert one.content_hash == same.content_hash != other.content_hash


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.mp4", None, "there is no such file"),
        ("a.mp4", b"\0\0\0\x20ftypisom" + bytes(64), "not a video that can be read"),
        ("b.mp4", b"words", "not a video that can be read"),
        ("c.mp4", b"", "not a video that can be read"),
    ],
)
def test_files_that_are_no_video(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        load_video(str(tmp_path / name), 4)


def test_a_damaged_video_and_one_of_too_many_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.avi", RAMP)
    (tmp_path / "cut.avi").write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(ImageError, match="truncated: its header tells of 20 frames"):
        load_video(str(tmp_path / "cut.avi"), 4)
    monkeypatch.setattr(video_frames, "MAX_FRAMES_IN_FILE", 10)
    with pytest.raises(ImageError, match="it has 20 frames, and 10 are allowed: cut it"):
        load_video(str(path), 4)
    monkeypatch.setattr(video_frames, "MAX_FRAMES_IN_FILE", 100)
    monkeypatch.setattr(video_frames, "MAX_ROW_PIXELS", 3 * SIZE[0] * SIZE[1])
    with pytest.raises(ImageError, match="give fewer --video_frames"):
        load_video(str(path), 4)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(video_frames, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vlmtune\[video\]"'):
        check_installed()
