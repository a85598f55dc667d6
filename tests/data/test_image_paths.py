"""Which images a row may name."""

import os
from pathlib import Path

import pytest
from formats_kit import HELLO, read, read_good, write_lines

from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.scan import scan
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join


def test_outside_and_remote_images_on_request(linked_folder: Path) -> None:
    names = [
        "../outside.png",
        "/etc/passwd",
        "file:///etc/hosts",
        "link.png",
        "https://example.com/a.png",
        "s3://other/a b.png",
    ]
    path = write_lines(linked_folder / "rows.jsonl", *({**HELLO, "image": name} for name in names))
    outside = str(linked_folder.parent / "outside.png")
    expected = [
        outside,
        "/etc/passwd",
        "/etc/hosts",
        outside,
        "https://example.com/a.png",
        "s3://other/a%20b.png",
    ]
    found = [row["images"] for row in read_good(path, allow_outside_paths=True, allow_remote_images=True)]
    assert found == [[name] for name in expected[:1]] + [
        [os.path.realpath(name)] for name in expected[1:4]
    ] + [[name] for name in expected[4:]]
    assert [row["error"] is None for row in read(path, allow_outside_paths=True)] == [True] * 4 + [False] * 2
    assert [row["error"] is None for row in read(path, allow_remote_images=True)] == [False] * 4 + [True] * 2


def test_paths_that_stay_inside_are_fine(linked_folder: Path) -> None:
    path = write_lines(
        linked_folder / "rows.jsonl",
        *(
            {**HELLO, "image": name}
            for name in (
                "a.png",
                "sub/../a.png",
                str(linked_folder / "a.png"),
                (linked_folder / "a.png").as_uri(),
            )
        ),
    )
    assert [row["images"] for row in read_good(path)] == [[str(linked_folder / "a.png")]] * 4


def test_image_root(linked_folder: Path) -> None:
    path = write_lines(
        linked_folder / "rows.jsonl", {**HELLO, "image": "x.png"}, {**HELLO, "image": "../data/a.png"}
    )
    inside, leaving = read(path, image_root=str(linked_folder.parent / "data2"))
    assert inside["images"] == [str(linked_folder.parent / "data2" / "x.png")]
    assert "leaves the folder" in leaving["error"]
    with pytest.raises(DataError, match="--image_root nowhere: no such folder"):
        scan(str(path), image_root="nowhere")


def test_images_of_data_in_a_bucket() -> None:
    rules = ImageRules("s3://bucket/data?region=eu-west-1")
    assert (
        rules.resolve("a b.png")
        == rules.resolve("sub/../a b.png")
        == "s3://bucket/data/a%20b.png?region=eu-west-1"
    )
    assert (
        rules.resolve("s3://bucket/data/a.png?endpoint_override=elsewhere")
        == "s3://bucket/data/a.png?region=eu-west-1"
    )
    assert filesystem(rules.resolve("a b%2e.png"))[1] == "bucket/data/a b%2e.png"
    assert join(rules.root, "messages.txt") == "s3://bucket/data/messages.txt?region=eu-west-1"
    for name in (
        "../b.png",
        "/b.png",
        "s3://bucket/data2/a.png",
        "s3://bucket/data/%2e%2e/a.png",
        "s3://other/data/a.png",
        "file:///b.png",
    ):
        with pytest.raises(RowError, match="leaves the folder"):
            rules.resolve(name)
    for name in ("gs://bucket/data/a.png", "https://bucket/data/a.png"):
        with pytest.raises(RowError, match="is remote"):
            rules.resolve(name)
    assert (
        ImageRules(rules.root, allow_outside_paths=True).resolve("../b.png")
        == "s3://bucket/b.png?region=eu-west-1"
    )
