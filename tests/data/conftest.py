"""Files that the tests of data share."""

from pathlib import Path

import pytest
from formats_kit import png


@pytest.fixture
def linked_folder(tmp_path: Path) -> Path:
    """A data folder with links out of it."""
    folder = tmp_path / "data"
    png(tmp_path / "outside.png")
    png(tmp_path / "data2" / "x.png")
    png(folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "links").symlink_to(tmp_path)
    return folder
