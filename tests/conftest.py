"""What several modules test on and is slow to make: tiny models and sample pictures, written once a session. Nobody may change them."""

from pathlib import Path

import pytest
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.demo.models import FAMILIES, write_model
from vlmtune.demo.scenes import write_mall


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family, named after it; qwen2_5_vl only where torchvision is installed."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        if family != "qwen2_5_vl" or is_torchvision_available():
            write_model(family, folder / family)
    return folder


@pytest.fixture(scope="session")
def mall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frames folder of 24 pictures, two dialogues each."""
    folder = tmp_path_factory.mktemp("samples") / "mall"
    write_mall(folder, frames=24)
    return folder
