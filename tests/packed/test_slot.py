"""One trial in an engine; the layers that its adapter is for, and what cannot be made."""

from pathlib import Path

import pytest
import torch
from packed_kit import CLOSE, TRIALS, pack
from safetensors.torch import load_file
from training_kit import difference, values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.packed.slot import SlotFactory
from vlmtune.packed.trial_checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, PEFT_PREFIX
from vlmtune.packed.worker_shard import WorkerShard

pytestmark = pytest.mark.timeout(200)

SHARD = WorkerShard(1, 2)


def test_a_checkpoint_keeps_its_numbers_until_it_is_written(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    packed = pack(
        stores["mall llava"],
        models / "llava",
        tmp_path,
        {"one": {"max_steps": 6, "learning_rate": 1e-2, "eval_strategy": "no"}},
    )
    slot = packed.engine.slots["one"]
    writes, expected = [], []
    for step in range(3):
        packed.engine.train_round()
        writes.append(slot.begin_checkpoint())
        expected.append(slot.adapter.flat.clone())
        if step == 1:  # the first is written while the second waits, and the third takes its position
            writes[0].write(made(tmp_path / "0"), lambda _: None)
    for step in (1, 2):
        writes[step].write(made(tmp_path / str(step)), lambda _: None)
    for step, flat in enumerate(expected):
        adapter = load_file(tmp_path / str(step) / ADAPTER_FILE)
        pairs = slot.adapter.layout.unpack(flat, slot.adapter.names, slot.adapter.lora_rank)
        for name, pair in pairs.items():
            assert all(
                torch.equal(adapter[f"{PEFT_PREFIX}{name}.lora_{half}.weight"], one)
                for half, one in zip("AB", pair, strict=True)
            )
        averages = torch.load(tmp_path / str(step) / OPTIMIZER_FILE)["flat"]
        assert averages["exp_avg"].abs().sum() > 0
    assert not torch.equal(expected[0], expected[1])
    assert len(slot.adapter.host_memory.free) == 2, "memory for as many as there were at once"


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_dropout_does_not_depend_on_the_neighbours(stores: dict[str, Store], models: Path, tmp_path: Path):
    store, trial = stores["mall llava"], {"lora_r": 4, "lora_dropout": 0.3, "max_steps": 4}
    runs = {}
    neighbours = {"other": TRIALS["three"], "third": {**trial, "lora_dropout": 0.5}}
    for what, beside in {"alone": {}, "neighbours": neighbours, "none": None}.items():
        mine = trial if beside is not None else {**trial, "lora_dropout": 0.0}
        packed = pack(store, models / "llava", tmp_path / what, {"mine": mine, **(beside or {})})
        packed.run()
        packed.close()
        runs[what] = packed.adapter("mine")
    assert difference(runs["neighbours"], runs["alone"]) < CLOSE
    assert difference(runs["none"], runs["alone"]) > 1e-2


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
