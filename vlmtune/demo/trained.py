"""The demo's trained base: a LLaVA of 3.8 MB that counts drawn toys. It was never trained on people."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

BASE = Path(__file__).parent / "base"


def write_trained_llava(folder: Path | str) -> None:
    """Copy the base to `folder`. A folder that has `config.json` is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".part-") as unfinished:
        for path in sorted(BASE.iterdir(), key=lambda path: path.name == "config.json"):
            shutil.copyfile(path, Path(unfinished) / path.name)
            (Path(unfinished) / path.name).replace(folder / path.name)
