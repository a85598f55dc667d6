"""The Dockerfile, as hadolint and its shell rules see it, and that what it copies is there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_copied_file_is_in_the_repository() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    names = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert len(names) >= 6 and [name for name in names if not (ROOT / name).exists()] == []
