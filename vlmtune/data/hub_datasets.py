"""Reads Hugging Face datasets, from the Hub or a saved folder, as records whose images are still encoded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.split import TRAIN
from vlmtune.data.splits_given import split_of_name
from vlmtune.errors import DataError
from vlmtune.hub import stay_offline_unless_reachable

ROWS_AT_ONCE = 32  # rows in memory at once; each may hold encoded images


def dataset_folder(name: str) -> str:
    """The folder of the download cache that holds the files of one dataset."""
    from huggingface_hub import constants

    return str(Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}")


def extracted_folder() -> str:
    """The folder that archives of datasets are unpacked to."""
    import datasets

    return str(Path(datasets.config.EXTRACTED_DATASETS_PATH))


def load_splits(path: str, shown_path: str, *, from_hub: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The train, evaluation and test splits of a dataset as `datasets.Dataset`, and notes on other splits.

    A dataset without splits has the key "".

    Args:
        path: the name of a dataset of the Hub, which is downloaded unless it is in the cache; or a folder
            that `save_to_disk` wrote.
        shown_path: what messages call it.

    Raises:
        DataError: there is no split to train on. What `datasets` raises is not caught.
    """
    import datasets

    if from_hub:
        stay_offline_unless_reachable()
        data = datasets.load_dataset(path)
    else:
        data = datasets.load_from_disk(path)
    if not isinstance(data, datasets.DatasetDict):
        return {"": data}, ()
    if not any(split_of_name(name) == TRAIN for name in data):
        raise DataError(
            f"{shown_path} has no split 'train' (it has: {', '.join(data)}): give the folder of the split "
            "to read"
        )
    known = {name: rows for name, rows in data.items() if split_of_name(name) is not None}
    others = [f"{name} ({len(rows)} rows)" for name, rows in data.items() if name not in known]
    return known, (f"splits that are not used: {', '.join(others)}",) if others else ()


def dataset_records(data: Any, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows `start` to `stop` of a dataset, with `columns` only; images as {"bytes", "path"}."""
    import datasets

    features = datasets.Features({name: _without_decoding(data.features[name]) for name in columns})
    rows = data.select(range(start, stop)).select_columns(columns).with_format("arrow")
    for table in rows.iter(ROWS_AT_ONCE):
        for stored in table.to_pylist():
            yield features.decode_example(stored)


def _without_decoding(feature: Any) -> Any:
    """The feature with files left encoded, because `images.load_image` decodes and checks images later."""
    import datasets

    for encoded in (datasets.Image, datasets.Audio, datasets.Video, datasets.Pdf, datasets.Nifti):
        if isinstance(feature, encoded):
            return encoded(decode=False)
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_without_decoding(feature.feature))
    return feature
