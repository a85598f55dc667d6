"""A search over two image resolutions, for tests: its settings, and its rows at both."""

from pathlib import Path

from vlmtune.config.settings import Settings
from vlmtune.data.cache import prepare_store
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.search.resolutions import prepare_resolutions
from vlmtune.search.space import Space

TOKEN = 28 * 28  # pixels of an image token
FEW, SOME = 4 * TOKEN, 9 * TOKEN
SPACE = {"max_pixels": {"choice": [FEW, SOME]}, "learning_rate": {"choice": [1e-3, 5e-3]}}


def search_settings(models: Path, mall: Path, cache: Path) -> Settings:
    """A small search with the tiny Qwen2.5-VL, whose own largest image has 16 tokens."""
    return Settings.from_flags(
        {
            "data_path": str(mall),
            "model_name_or_path": str(models / "qwen2_5_vl"),
            "cache_dir": str(cache),
            "use_cpu": True,
            "lora_r": 4,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj"],
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "eval_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": None,
            "max_pixels": SOME,
            "recipe": None,
            "search_space": SPACE,
        }
    )


def both_stores(settings: Settings) -> Store:
    """The rows at both resolutions, the settings' own first."""
    first = prepare_store(DataSource.from_settings(settings), str(settings.data.cache_dir))
    return prepare_resolutions(settings, Space.parse(SPACE, settings), first)
