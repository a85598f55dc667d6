"""Which runner a search takes, how many trials run at once, and what engines plan for."""

from pathlib import Path
from typing import Any

import pytest

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.space import Space
from vlmtune.search.trial_runners import (
    make_isolated_runner,
    make_runner,
    most_demanding_settings,
    unpackable_reason,
)


@pytest.fixture(scope="module")
def settings(models: Path) -> Settings:
    return Settings.from_flags(
        {
            "data_path": "data",
            "model_name_or_path": str(models / "llava"),
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "lora_target_modules": ["q_proj", "v_proj"],
            "per_device_train_batch_size": 4,
            "trial_runner": "packed",
            "search_space": {"lora_r": {"grid": [2, 4]}},
        }
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"more_metrics": ["peak_memory"]}, "for peak_memory, which packed trials share"),
        ({"num_workers": "2"}, "num_workers 2"),
        ({"quantization": "int8", "llm_int8": True}, "llm_int8"),
        ({"search_space": {"optim": {"choice": ["adamw_torch", "adafactor"]}}}, "optim adafactor"),
    ],
)
def test_what_keeps_a_search_from_packing_is_named(
    settings: Settings, changes: dict[str, Any], reason: str
) -> None:
    changed = settings.replace(**changes)
    space = Space.parse(changed.search.search_space or {}, changed)
    assert reason in (unpackable_reason(changed, space) or "")
    store: Any = None
    cluster = Cluster(dashboard=None, cpus=2, gpus=0, nodes=1)
    with pytest.raises(ConfigError, match=f"--trial_runner packed: cannot train .*{reason}"):
        make_runner(changed, space, store, "out", cluster)
    chosen = make_runner(changed.replace(trial_runner="auto"), space, store, "out", cluster)
    assert chosen.kind == "isolated"
    assert reason in chosen.description


def test_engines_plan_for_the_trial_that_asks_for_most(settings: Settings) -> None:
    targets = [["q_proj"], ["q_proj", "down_proj"], ["k_proj", "v_proj"]]
    changed = {
        "lora_r": {"choice": [2, 16]},
        "max_length": {"choice": [256, None, 128]},
        "lora_dropout": {"uniform": [0.0, 0.3]},
        "lora_target_modules": {"choice": targets},
        "per_device_train_batch_size": {"choice": [1, 8, 2]},
    }
    settings = settings.replace(recipe=None)
    demanding = most_demanding_settings(settings, Space.parse(changed, settings))
    lora = demanding.lora
    assert (lora.r, demanding.training.max_length, lora.dropout, lora.target_modules) == (
        16,
        None,
        0.3,
        targets[1],
    )
    assert demanding.training.per_device_train_batch_size == 8
    same = most_demanding_settings(
        settings, Space.parse({"learning_rate": {"uniform": [1e-4, 1e-3]}}, settings)
    )
    assert same == settings
    recipe = settings.replace(recipe={"lora_r": 32, "lora_target_modules": "all-linear"})
    beside = most_demanding_settings(
        recipe, Space.parse({"learning_rate": {"uniform": [1e-4, 1e-3]}}, recipe)
    )
    assert (beside.lora.r, beside.lora.target_modules) == (32, "all-linear")


@pytest.mark.parametrize(("workers", "at_once"), [("1", 2), ("2", 1), ("1:2", 1)])
def test_as_many_isolated_trials_run_at_once_as_their_largest_number_of_workers_allows(
    workers: str, at_once: int
) -> None:
    cluster = Cluster(dashboard=None, cpus=2, gpus=0, nodes=1)
    store: Any = None
    changed = Settings.from_flags({"num_workers": workers})
    assert make_isolated_runner(changed, store, "out", cluster, None).max_concurrent_trials == at_once
