"""Settings for the faulty rows, and the preflight's summary of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.model_ref import ModelRef
from vlmtune.preflight.statistics import summarize
from vlmtune.preflight.summary import Summary


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def configure(faulty_data: Path, models: Path) -> Callable[..., Settings]:
    values = {
        "data_path": str(faulty_data),
        "model_name_or_path": str(models / "llava"),
        "eval_fraction": 0.2,
        "test_fraction": 0.1,
    }

    def settings(**more: Any) -> Settings:
        return Settings.from_flags({**values, **more})

    return settings


@pytest.fixture(scope="session")
def summary(faulty_store: Store, configure: Callable[..., Settings], models: Path) -> Summary:
    settings = configure(
        max_length=100,
        on_bad_row="skip",
        max_bad_fraction=0.9,
        search_space={"max_length": {"choice": [32, 100, 400]}},
    )
    return summarize(faulty_store, settings, ModelRef(str(models / "llava")).processor().tokenizer)
