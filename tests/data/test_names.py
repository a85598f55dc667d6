"""Names of files as people write them."""

import unicodedata

import pytest

from vlmtune.data.names import is_system_file, names_image, names_video, same_name


def test_spellings_of_one_name() -> None:
    nfd = unicodedata.normalize("NFD", "사람_É.jpg")
    assert nfd != "사람_É.jpg"
    assert same_name(nfd) == same_name("사람_é.JPG")
    assert same_name("a\\B.png") == same_name("A/b.PNG")
    assert same_name("a.png") != same_name("b.png")


@pytest.mark.parametrize("name", ["._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "~$labels.csv"])
def test_what_programs_leave_behind(name: str) -> None:
    assert is_system_file(name)
    assert not is_system_file(f"a{name}")


def test_names_of_images_and_videos() -> None:
    assert all(map(names_image, ["a.JPG", "x/y.webp", "c.jfif", "phone.HEIC", "https://x/a.png?size=1"]))
    assert not any(map(names_image, ["a.mp4", "see a.jpg\nhere", "jpg", 3, None, "x" * 2000 + ".jpg"]))
    assert names_video("clip.MP4")
    assert not names_video("clip.jpg")
