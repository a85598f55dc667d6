"""Images that are not at the path that their row writes."""

import unicodedata
from pathlib import Path

import pytest
from formats_kit import HELLO, png, read, read_whole, write_lines

from vlmtune.data.image_search import ELSEWHERE, FoundImage, find_image, missing_hint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("images/a b.png", "images/IMG_1.PNG", "other/IMG_1.PNG", "other/b.png"):
        png(tmp_path / "data" / name)
    png(tmp_path / "data" / unicodedata.normalize("NFD", "사진/사람.png"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ("images\\IMG_1.png", "images/IMG_1.PNG"),
        ("Images/img_1.png", "images/IMG_1.PNG"),
        ("images/a%20b.png", "images/a b.png"),
        ("images\\a%20b.png", "images/a b.png"),
        ("사진/사람.png", unicodedata.normalize("NFD", "사진/사람.png")),
        ("/home/minji/project/images/IMG_1.PNG", "images/IMG_1.PNG"),
        ("C:\\Users\\me\\other\\b.png", "other/b.png"),
        ("D:/b.png", "other/b.png"),
    ],
)
def test_another_spelling_and_another_machine(reference: str, place: str, root: Path) -> None:
    found = find_image(str(root), reference)
    assert found is not None
    assert found.path == str(root / place)
    path = write_lines(root / "rows.jsonl", {**HELLO, "image": reference})
    (row,) = read_whole(path)
    assert (row["error"], row["images"], row["reading_notes"]) == (None, [str(root / place)], (found.note,))


def test_only_the_name_is_known(root: Path) -> None:
    assert find_image(str(root), "/x/b.png") == FoundImage(
        str(root / "other/b.png"), ELSEWHERE, found_by_name=True
    )
    assert find_image(str(root), "/x/IMG_1.PNG") is None
    assert missing_hint(str(root), "/x/IMG_1.PNG").startswith(f"2 files below {root} are called IMG_1.PNG")
    assert find_image(str(root), "b.png") is None, "a relative path is not sought elsewhere"
    assert find_image(str(root), "../data/images/x.png") is None


def test_what_helps_where_there_is_none(root: Path) -> None:
    assert "path of a Windows machine, and no z.png is below" in missing_hint(str(root), "C:\\z.png")
    assert "--image_root, the folder that holds the images" in missing_hint(str(root), "/x/z.png")
    assert missing_hint(str(root / "other"), "images/a b.png") == (
        f"it is below {root}: give --image_root {root}"
    )
    path = write_lines(root / "rows.jsonl", {**HELLO, "image": "/x/z.png"})
    assert read(path)[0]["error"].startswith("image /x/z.png: there is no such file, and no z.png is below")


def test_base64_is_no_path(root: Path) -> None:
    for text in ("iVBORw0KGgo" * 2000, "/9j/" + "4AAQSkZJRg" * 100 + "=="):
        path = write_lines(root / "rows.jsonl", {**HELLO, "image": text})
        error = read(path)[0]["error"]
        assert "is base64 text, not a path: save the image as a file" in error
        assert len(error) < 200
    path = write_lines(root / "rows.jsonl", {**HELLO, "image": "a" * 300 + ".png"})
    assert "longer than 255 bytes" in read(path)[0]["error"]
