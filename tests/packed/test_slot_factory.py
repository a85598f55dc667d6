"""The layers that a trial's adapter is for, and what cannot be made."""

from pathlib import Path

import pytest
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.packed.slot_factory import SlotFactory
from vlmtune.packed.worker_shard import WorkerShard

SHARD = WorkerShard(1, 2)


def settings_of(stores: dict[str, Store], models: Path, family: str) -> Settings:
    return Settings.from_flags(values_of(stores[f"mall {family}"], models / family))


def test_cross_attention_is_reached_by_rows_with_an_image_only(
    stores: dict[str, Store], models: Path
) -> None:
    settings = settings_of(stores, models, "mllama")
    factory = SlotFactory(settings, stores["mall mllama"], 1e6, SHARD)
    slot = factory.make("one", settings, folder="out")
    assert {target.image_only for target in slot.adapter.targets} == {True, False}
    for target in slot.adapter.targets:
        assert target.image_only == ("cross_attn" in target.name)
        layer = factory.meta_model.get_submodule(target.name)
        assert (target.in_features, target.out_features) == (layer.in_features, layer.out_features)
    assert slot.lora_config.target_modules
    assert slot.lora_config.base_model_name_or_path == str(models / "mllama")
    assert (slot.shard, slot.records.meter.flops_per_token) == (SHARD, 1e6)


def test_what_cannot_be_made_says_why(stores: dict[str, Store], models: Path) -> None:
    settings = settings_of(stores, models, "llava")
    factory = SlotFactory(settings, stores["mall llava"], 1e6, SHARD)
    with pytest.raises(ConfigError, match="trial_runner packed: cannot train use_dora"):
        factory.make("dora", settings.replace(use_dora=True), folder="out")
    with pytest.raises(ModelError, match="no_such_layer"):
        factory.make("none", settings.replace(lora_target_modules="no_such_layer"), folder="out")
    with pytest.raises(DataError, match="max_length"):
        factory.make("short", settings.replace(max_length=8), folder="out")
