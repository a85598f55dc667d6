"""Hugging Face datasets, saved and of the Hub."""

from pathlib import Path

import pytest
from formats_kit import ANSWERED, ASKED, HELLO, TRAINED, png, read_good, write_lines

from vlmtune.data import scan as scan_module
from vlmtune.data.formats import read_fragment
from vlmtune.data.fragment import Fragment
from vlmtune.data.image_paths import ImageRules
from vlmtune.data.scan import scan
from vlmtune.errors import DataError


def test_saved_dataset_keeps_images_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(scan_module, "ROWS_PER_FRAGMENT", 2)
    image = str(png(tmp_path / "a.png"))
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "camera": datasets.Value("int64"),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    dialogue = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red"}]
    data = datasets.Dataset.from_dict(
        {"images": [[image]] * 5, "camera": range(5), "messages": [dialogue] * 5}, features=features
    )
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "both"))
    data.save_to_disk(str(tmp_path / "one"))
    for name in ("both", "one"):
        assert len(scan(str(tmp_path / name))) == (4 if name == "both" else 3)
        rows = read_good(tmp_path / name, group_by="camera")
        assert [row["source"] for row in rows[5:]] == [f"{tmp_path}/both test row 0"] * (name == "both")
        rows = rows[:5]
        assert [row["source"] for row in rows] == [f"{tmp_path}/{name} row {number}" for number in range(5)]
        assert [row["group"] for row in rows] == list("01234")
        assert rows[4]["images"] == [Path(image).read_bytes()]
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "test_only"))
    with pytest.raises(DataError, match=r"no split 'train' \(it has: test\)"):
        scan(str(tmp_path / "test_only"))


def test_dataset_that_datasets_builds_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    write_lines(tmp_path / "repository" / "train.jsonl", HELLO, {**HELLO, "image": "/etc/passwd"})
    fragment = Fragment(
        "hub",
        str(tmp_path / "repository"),
        "owner/name",
        ImageRules(str(tmp_path / "cache")),
        stop=2,
        dataset_split="train",
    )
    good, bad = read_fragment(fragment)
    assert {name: good[name] for name in TRAINED} == {
        "source": "owner/name row 0",
        "messages": [ASKED, ANSWERED],
        "images": [],
        "group": None,
        "error": None,
    }
    assert (bad["source"], "leaves the folder" in bad["error"]) == ("owner/name row 1", True)


def test_hub_name_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = "nobody/none: no such file or folder here"
    with pytest.raises(
        DataError, match=f"{missing}, and no Hugging Face dataset of that name could be loaded"
    ):
        scan("nobody/none")
