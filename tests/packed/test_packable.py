"""Settings that cannot be trained packed."""

from pathlib import Path
from typing import Any

import pytest
from packed_kit import make_engine
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.packed.packable import not_packable

pytestmark = pytest.mark.timeout(200)


REFUSED = {
    "use_dora": True,
    "lora_modules_to_save": ["lm_head"],
    "fp16": True,
    "optim": "adafactor",
    "neftune_noise_alpha": 5.0,
    "lora_vision": True,
    "num_workers": "1:2",
    "eval_on_start": True,
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items())
def test_what_cannot_be_packed_is_refused_by_name(
    option: str, value: Any, stores: dict[str, Store], models: Path
):
    settings = Settings.from_flags(values_of(stores["mall llava"], models / "llava", **{option: value}))
    assert option in (not_packable(settings) or "")


def test_an_engine_refuses_such_a_trial(stores: dict[str, Store], models: Path, tmp_path: Path):
    packed = make_engine(values_of(stores["mall llava"], models / "llava"), stores["mall llava"], tmp_path)
    with pytest.raises(ConfigError, match="trial_runner packed: cannot train use_dora"):
        packed.join("dora", values_of(stores["mall llava"], models / "llava", use_dora=True))
