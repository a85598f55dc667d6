"""Which images a row may name."""

import os
import time
from pathlib import Path

import pytest
from formats_kit import HELLO, png, read, read_good, write_lines

from vlmtune.data.hub_datasets import dataset_folder
from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.images import ImageError, load_image
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


def test_paths_that_no_file_has_are_refused_at_once(tmp_path: Path) -> None:
    rules = ImageRules(str(tmp_path), allow_outside_paths=True, allow_remote_images=True)
    start = time.monotonic()
    for path in ("a" * 1_000_000, "a/" * 500_000, "../" * 300_000, "https://host/" + "a" * 1_000_000):
        with pytest.raises(RowError, match="characters, which no path has") as refusal:
            rules.resolve(path)
        assert len(str(refusal.value)) < 200
    assert time.monotonic() - start < 1


def test_an_image_uri_names_no_server_in_its_options(tmp_path: Path) -> None:
    rules = ImageRules("s3://bucket/data", True, True)
    with pytest.raises(RowError, match="has options behind its"):
        rules.resolve("s3://other/a.png?endpoint_override=169.254.169.254")
    assert rules.resolve("s3://other/a.png") == "s3://other/a.png"


@pytest.mark.parametrize("name", ["labels.csv", "messages.txt", "rows.jsonl"])
def test_a_data_folder_shows_no_file_of_elsewhere(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password,1234\n")
    folder = tmp_path / "data"
    (folder / "frames").mkdir(parents=True)
    png(folder / "frames" / "1.png")
    for one in {"labels.csv", "messages.txt"} if name != "rows.jsonl" else set():
        (folder / one).write_text("image,a\n1.png,2\n" if one == "labels.csv" else "USER: q\nASSISTANT: a\n")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(DataError, match=f"{name} is a link to a file outside the folder") as refusal:
        scan(str(folder))
    assert "password" not in str(refusal.value)


def test_links_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "1", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_lines(blobs / "abc", HELLO)
    (snapshot / "rows.jsonl").symlink_to(blobs / "abc")
    assert len(read_good(snapshot)) == 1


def test_an_image_of_the_hub_is_one_of_the_datasets_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token of the user lies in the folder above: `"image": "token"` printed its first bytes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    own, other = dataset_folder("owner/name"), dataset_folder("owner/other")
    rules = ImageRules(own, more_roots=(str(tmp_path / "extracted"),))
    assert rules.resolve(f"{own}/snapshots/1/a.png") == f"{own}/snapshots/1/a.png"
    assert rules.resolve(f"{tmp_path}/extracted/1/a.png") == f"{tmp_path}/extracted/1/a.png"
    for path in ("../../token", f"{tmp_path}/token", f"{other}/a.png"):
        with pytest.raises(RowError, match="leaves the folder"):
            rules.resolve(path)


def test_what_is_no_image_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_abcdefgh")
    with pytest.raises(ImageError) as refusal:
        load_image(str(tmp_path / "token"))
    assert str(refusal.value) == "not an image"
