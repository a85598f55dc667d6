"""The drawn mall: its files, and that each counted person can be seen."""

import csv
import re
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops, ImageStat

from vlmtune.demo import mall as mall_module


@pytest.fixture(scope="module")
def mall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "mall"
    mall_module.write_mall(folder, frames=40, seed=3)
    return folder


def labels(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_row_has_its_frame(mall: Path) -> None:
    rows = labels(mall)
    assert list(rows[0]) == ["id", "count", "camera"]
    frames = sorted(path.name for path in (mall / "frames").iterdir())
    assert frames == [f"seq_{int(row['id']):06d}.jpg" for row in rows]
    assert len(frames) == 40
    for name in frames:
        with Image.open(mall / "frames" / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (112, 84))


def test_counts_and_cameras_vary(mall: Path) -> None:
    rows = labels(mall)
    assert {int(row["count"]) for row in rows} >= {0, 6}
    assert all(0 <= int(row["count"]) <= 6 for row in rows)
    assert {row["camera"] for row in rows} == {camera.name for camera in mall_module.CAMERAS}


def test_messages_hold_an_english_and_a_korean_dialogue(mall: Path) -> None:
    english, korean = (mall / "messages.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert re.fullmatch(r"USER: .+\nASSISTANT: \{count\}", english)
    assert re.fullmatch(r"사용자: .+\n어시스턴트: \{count\}명", korean)


def test_a_seed_always_gives_the_same_files(mall: Path, tmp_path: Path) -> None:
    mall_module.write_mall(tmp_path / "same", frames=40, seed=3)
    mall_module.write_mall(tmp_path / "other", frames=40, seed=4)
    files = sorted(path.relative_to(mall) for path in mall.rglob("*.*"))
    assert all((mall / file).read_bytes() == (tmp_path / "same" / file).read_bytes() for file in files)
    assert labels(mall) != labels(tmp_path / "other")


def test_seed_0_keeps_its_labels(tmp_path: Path) -> None:
    """The demo's rows are part of what its figures are measured on: they change only on purpose."""
    mall_module.write_mall(tmp_path, frames=6)
    assert [(row["count"], row["camera"]) for row in labels(tmp_path)] == [
        ("6", "west_hall"),
        ("1", "entrance"),
        ("2", "entrance"),
        ("1", "entrance"),
        ("4", "entrance"),
        ("5", "food_court"),
    ]


@pytest.mark.parametrize("number", [1, 5, 9])
def test_people_stand_inside_the_frame_and_apart(number: int) -> None:
    for seed in range(20):
        camera = mall_module.CAMERAS[seed % len(mall_module.CAMERAS)]
        people = mall_module._place_people(number, camera, Random(seed))
        boxes = [person.box(camera) for person in people]
        assert len(people) == number
        assert [person.z for person in people] == sorted((person.z for person in people), reverse=True)
        for left, top, right, bottom in boxes:
            middle = (left + right) / 2
            assert 0 < middle < mall_module.WIDTH * mall_module.OVERSAMPLING
            assert 0 < top < bottom < mall_module.HEIGHT * mall_module.OVERSAMPLING
        crowding = [mall_module.overlap(one, other) for at, one in enumerate(boxes) for other in boxes[:at]]
        assert max(crowding, default=0.0) < 0.6


def test_each_person_is_seen_in_the_frame() -> None:
    camera = mall_module.CAMERAS[0]
    scenery = mall_module._draw_scenery(camera, Random(0))
    people = mall_module._place_people(9, camera, Random(1))
    whole = mall_module._draw_frame(scenery, camera, people, Random(2))
    for person in people:
        without = mall_module._draw_frame(
            scenery, camera, [other for other in people if other is not person], Random(2)
        )
        left, top, right, bottom = (round(edge / mall_module.OVERSAMPLING) for edge in person.box(camera))
        change = ImageStat.Stat(
            ImageChops.difference(whole, without).crop((left, top, right, bottom)).convert("L")
        )
        assert change.mean[0] > 5.0  # of 255


def test_no_unfinished_file_is_left(mall: Path) -> None:
    assert not [*mall.rglob("*.part")]
