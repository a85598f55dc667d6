"""Videos in rows: fields, marks and typed parts."""

from pathlib import Path
from typing import Any

import pytest
from formats_kit import read_whole, write_lines

TURNS = [{"role": "user", "content": "What happens?"}, {"role": "assistant", "content": "A fall."}]
LLAVA = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A fall."}]


def question(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, TURNS[1]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": question("<video>What happens?"), "videos": ["a.mp4"]},
        {"messages": TURNS, "videos": ["a.mp4"]},
        {"messages": TURNS, "video": "a.mp4"},
        {"conversations": LLAVA, "video": "a.mp4", "id": 3},
        {"query": "<video>What happens?", "response": "A fall.", "videos": ["a.mp4"]},
        {
            "messages": question(
                [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What happens?"}]
            )
        },
        {
            "messages": question([{"type": "video"}, {"type": "text", "text": "What happens?"}]),
            "videos": [{"path": "a.mp4", "bytes": None}],
        },
    ],
)
def test_videos_stand_where_their_marks_are(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a video")
    (found,) = read_whole(write_lines(tmp_path / "rows.jsonl", row))
    assert found["error"] is None
    assert found["videos"] == (str(tmp_path / "a.mp4"),)
    assert found["messages"][0]["content"] == [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    assert found["unused"] == (("field id",) if "id" in row else ())


def test_images_and_videos_of_one_row(tmp_path: Path) -> None:
    row = {
        "messages": question("Is <image> in <video> or in <video>?"),
        "images": ["a.png"],
        "videos": ["a.mp4", "b.mp4"],
    }
    (found,) = read_whole(write_lines(tmp_path / "rows.jsonl", row))
    kinds = [part["type"] for part in found["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "video", "text", "video", "text"]
    assert [Path(path).name for path in (*found["images"], *found["videos"])] == ["a.png", "a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": question("<video> <video> What?"), "videos": ["a.mp4"]},
            "2 <video> marks but 1 video: ",
        ),
        ({"messages": TURNS, "videos": ["a.mp4"], "video": "b.mp4"}, "both 'videos' and 'video': keep one"),
        ({"messages": TURNS, "videos": [["a.png", "b.png"]]}, "must be the path of a video file, not a list"),
        ({"messages": TURNS, "videos": ["a.txt"]}, "(a.txt) has no ending of a video file"),
        ({"messages": TURNS, "videos": ["../a.mp4"]}, "video path ../a.mp4 leaves the folder"),
        (
            {"messages": TURNS, "audios": ["a.wav"]},
            "'audios' holds a video or sound, which is not read there",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "holds a video: only user turns may show one",
        ),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = read_whole(write_lines(tmp_path / "rows.jsonl", row))
    assert reason in str(found["error"])


def test_a_video_beside_an_image_needs_a_mark(tmp_path: Path) -> None:
    row = {"messages": TURNS, "images": ["a.png"], "video": "a.mp4"}
    (found,) = read_whole(write_lines(tmp_path / "rows.jsonl", row))
    assert (found["error"], found["videos"], found["unused"]) == (None, (), ("field video",))
    assert found["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What happens?"}]


def test_a_mark_without_a_video_is_text_with_a_note(tmp_path: Path) -> None:
    (found,) = read_whole(write_lines(tmp_path / "rows.jsonl", {"messages": question("<video> What?")}))
    assert found["messages"][0]["content"] == [{"type": "text", "text": "<video> What?"}]
    assert found["reading_notes"] == ("<video> stands in a question and is read as text",)
