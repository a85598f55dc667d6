"""Hugging Face datasets, of the Hub or of a saved folder, as records whose images are still encoded."""

from collections.abc import Iterator
from typing import Any

from vlmtune.errors import DataError
from vlmtune.hub import stay_offline_unless_reachable

ROWS_AT_ONCE = 32  # in memory; each may hold encoded images


def load_dataset(path: str, shown: str, *, from_hub: bool) -> Any:
    """The `train` split of a dataset, as a `datasets.Dataset`.

    Args:
        path: the name of a dataset of the Hub, which is downloaded unless it is in the cache; or a folder
            that `save_to_disk` wrote.
        shown: what messages call it.

    Raises:
        DataError: a saved folder has no such split. What `datasets` raises is not caught.
    """
    import datasets

    if from_hub:
        stay_offline_unless_reachable()
        return datasets.load_dataset(path, split="train")
    data = datasets.load_from_disk(path)
    if not isinstance(data, datasets.DatasetDict):
        return data
    if "train" not in data:
        raise DataError(
            f"{shown} has no split 'train' (it has: {', '.join(data)}): give the folder of the split to read"
        )
    return data["train"]


def dataset_records(data: Any, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows `start` to `stop` of a dataset, with `columns` only; images as {"bytes", "path"}."""
    import datasets

    features = datasets.Features({name: _without_decoding(data.features[name]) for name in columns})
    rows = data.select(range(start, stop)).select_columns(columns).with_format("arrow")
    for table in rows.iter(ROWS_AT_ONCE):
        for stored in table.to_pylist():
            yield features.decode_example(stored)


def _without_decoding(feature: Any) -> Any:
    """The feature with its images left encoded: `images.load_image` decodes and checks them later."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_without_decoding(feature.feature))
    return feature
