"""Which column of labels.csv names the frames, and which frame a cell means."""

import unicodedata

import pytest

from vlmtune.data.frame_key import FrameNames, Key, choose_key
from vlmtune.data.tables import Table
from vlmtune.errors import DataError

FRAMES = [f"frame_{number:03d}.jpg" for number in range(1, 7)]
ORDER = [3, 1, 6, 2, 5, 4]  # of the frames in the rows


def key(columns: dict[str, list[object]], frames: list[str] = FRAMES, used: tuple[str, ...] = ()) -> Key:
    rows = [list(map(str, values)) for values in zip(*columns.values(), strict=True)]
    table = Table(list(columns), list(enumerate(rows, 2)))
    return choose_key(table, FrameNames(frames), set(used), "labels.csv")


def found(chosen: Key) -> list[list[str]]:
    return [names[1:] for names in chosen.frames]


RIGHT = [[f"frame_{number:03d}.jpg"] for number in ORDER]
NAMES: list[object] = [f"frame_{number:03d}.jpg" for number in ORDER]
RUNNING: list[object] = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("column", ["image_name", "파일명", "whatever", "File"])
@pytest.mark.parametrize("running", ["id", "index", "frame", "image"])
def test_a_column_of_names_wins_over_a_running_number(column: str, running: str) -> None:
    chosen = key({running: RUNNING, column: NAMES, "count": RUNNING}, used=("count",))
    assert (chosen.column, found(chosen)) == (column, RIGHT)
    assert chosen.note == f"frames matched by column {column}: 6 of 6 rows"


def test_a_number_of_a_frame_wins_over_a_running_number() -> None:
    for column in ("frame", "frame_number", "image_id", "사진번호"):
        chosen = key({"id": RUNNING, column: list(ORDER)})
        assert (chosen.column, found(chosen)) == (column, RIGHT)
        assert chosen.note == f"frames matched by the number in column {column}: 6 of 6 rows"


def test_a_doubtful_key_is_an_error_with_both_readings() -> None:
    before: list[object] = [f"frame_{number:03d}.jpg" for number in (6, 5, 4, 3, 2, 1)]
    with pytest.raises(DataError) as caught:
        key({"previous_frame": before, "next_frame": NAMES})
    assert "columns 'next_frame' and 'previous_frame' name different frames" in str(caught.value) or (
        "columns 'previous_frame' and 'next_frame' name different frames" in str(caught.value)
    )
    assert "'frame_006.jpg' the row is of frame_006.jpg" in str(caught.value)
    assert "'frame_003.jpg' it is of frame_003.jpg; call the right one 'image'" in str(caught.value)
    with pytest.raises(DataError, match="'id' and 'order' name different frames"):
        key({"id": RUNNING, "order": list(ORDER)})
    assert key({"image": NAMES, "next_frame": before}).column == "image"
    assert key({"image": NAMES, "copy_of_image": NAMES}).column == "image"


def test_labels_that_look_like_frame_numbers_are_labels() -> None:
    chosen = key({"id": RUNNING, "count": list(ORDER)}, used=("count",))
    assert chosen.column == "id"


@pytest.mark.parametrize(
    ("value", "frame"),
    [
        ("IMG_1.jpg", "img_1.JPG"),
        (unicodedata.normalize("NFC", "사람.png"), unicodedata.normalize("NFD", "사람.png")),
        ("day1\\000.jpg", "day1/000.jpg"),
        ("000.jpg", "day1/000.jpg"),
        ("C:/Users/me/frames/a.webp", "a.webp"),
        ("frames/a", "a.webp"),
        ("7", "seq_000007.jpg"),
    ],
)
def test_a_cell_finds_its_frame(value: str, frame: str) -> None:
    assert FrameNames(["other_9.jpg", frame]).find(value) == [frame]


def test_a_cell_that_means_no_single_frame() -> None:
    names = FrameNames(["day1/000.jpg", "day2/000.jpg", "b_1.png"])
    assert names.find("000.jpg") == ["day1/000.jpg", "day2/000.jpg"]
    assert names.find("day2/000.jpg") == ["day2/000.jpg"]
    assert names.find("b_1.jpg") == names.find("5") == []


def test_no_column_names_frames() -> None:
    with pytest.raises(
        DataError, match=r"labels.csv names no image: it needs a column image, .* it has: a, b"
    ):
        key({"a": ["x"] * 6, "b": ["y"] * 6})
