"""The split of prepared rows: by content, by group, by evaluation files."""

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from prepare_kit import counted, noise_image, splits_of, write_lines

from vlmtune.cluster import connect
from vlmtune.data.cache import prepare_store
from vlmtune.data.lengths import mixture_of
from vlmtune.data.order import Order
from vlmtune.data.source import DataSource
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def llava(models: Path) -> str:
    return str(models / "llava")


def test_splits_follow_the_content_not_the_order_of_rows(tmp_path: Path, llava: str) -> None:
    rows = [{"instruction": f"What is {number}?", "output": f"n{number}"} for number in range(40)]
    path = write_lines(tmp_path / "data.jsonl", rows)
    shuffled = random.Random(0).sample(rows, len(rows))
    other = write_lines(tmp_path / "shuffled.jsonl", shuffled)
    one, two = (
        prepare_store(DataSource(str(file), ModelRef(llava)), str(tmp_path / "cache"))
        for file in (path, other)
    )
    by_text = [
        {row["output"]: side for row, side in zip(order, splits_of(s).values(), strict=True)}
        for order, s in ((rows, one), (shuffled, two))
    ]
    assert by_text[0] == by_text[1]
    assert set(by_text[0].values()) == {"train", "eval", "test"}
    reseeded = prepare_store(DataSource(str(path), ModelRef(llava), seed=1), str(tmp_path / "cache"))
    assert splits_of(reseeded) != splits_of(one)


def test_group_by_keeps_a_camera_in_one_split(tmp_path: Path, mall: Path, llava: str) -> None:
    store = prepare_store(
        DataSource(str(mall), ModelRef(llava), group_by="camera", eval_fraction=0.2, test_fraction=0.2),
        str(tmp_path),
    )
    lines = [line.split(",") for line in (mall / "labels.csv").read_text().splitlines()[1:]]
    camera = {f"seq_{int(number):06d}": name for number, _, name in lines}
    on = defaultdict(set)
    for source, side in splits_of(store).items():
        on[camera[Path(source.split(" (")[0]).stem]].add(side)
    assert len(on) == 4
    assert all(len(found) == 1 for found in on.values())
    assert set(store.column("split")) == {"train", "eval", "test"}


def test_too_few_groups_for_the_splits(tmp_path: Path, llava: str) -> None:
    rows = counted(tmp_path)
    path = write_lines(tmp_path / "data.jsonl", [{**row, "image": rows[0]["image"]} for row in rows])
    with pytest.raises(
        DataError,
        match=r"8 rows in 1 group of equal images .* no row for train: 8 rows stay together, because they "
        r"share images, such as .*000.png in 8 rows; give --eval_data_path",
    ):
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_evaluation_data_of_its_own(tmp_path: Path, llava: str) -> None:
    rows = counted(tmp_path)
    train, held = (
        write_lines(tmp_path / "train.jsonl", rows[:5]),
        write_lines(tmp_path / "eval.jsonl", rows[5:]),
    )
    store = prepare_store(
        DataSource(str(train), ModelRef(llava), eval_data_path=str(held), test_fraction=0.2),
        str(tmp_path / "cache"),
    )
    assert store.column("split")[5:].tolist() == ["eval"] * 3
    assert sorted(store.column("split")[:5]) == ["test"] + ["train"] * 4


def test_evaluation_data_with_an_image_that_is_trained_on(tmp_path: Path, llava: str) -> None:
    """The same image under another name and in another file format."""
    rows = counted(tmp_path)
    noise_image(2).save(tmp_path / "images" / "copy.bmp")
    train = write_lines(tmp_path / "train.jsonl", rows[:5])
    held = write_lines(tmp_path / "eval.jsonl", [*rows[5:], {**rows[5], "image": "images/copy.bmp"}])
    with pytest.raises(
        DataError,
        match=rf"{train}:3: the same image or group is also in {held}:4, a row of the eval data; remove",
    ):
        prepare_store(
            DataSource(str(train), ModelRef(llava), eval_data_path=str(held), test_fraction=0),
            str(tmp_path / "cache"),
        )
    assert not list((tmp_path / "cache").glob("*.part"))


def test_several_sources_and_the_share_of_each(tmp_path: Path, llava: str) -> None:
    for name, number in (("a", 40), ("b", 20)):
        rows = [{"instruction": f"{name} {index}?", "output": "yes"} for index in range(number)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    paths = (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl")
    store = prepare_store(DataSource(paths, ModelRef(llava)), str(tmp_path / "cache"))
    assert sorted(splits_of(store)) == sorted(
        f"{tmp_path}/{name}.jsonl:{line}"
        for name, number in (("a", 40), ("b", 20))
        for line in range(1, number + 1)
    )
    train = store.rows_of("train")
    kept = np.arange(len(train))
    assert mixture_of(store, kept, None) is None
    mixture = mixture_of(store, kept, [0.25, 0.75])
    assert mixture is not None
    from_a = ["a.jsonl" in source for source in store.column("source")[train]]
    assert mixture.sizes == (sum(from_a), len(train) - sum(from_a))
    order = Order(len(train), 4, 1, 1, seed=0, mixture=mixture)
    drawn = [from_a[row] for row in order.permutation(0)]
    assert abs(sum(drawn) - len(train) / 4) <= 1
