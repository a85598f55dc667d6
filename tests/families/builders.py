"""All tiny families, by name: `FAMILIES`, and `build`, which writes one to a folder.

PYTHONPATH=tests python -m families.builders FOLDER [NAME …]
"""

import sys
import time
import traceback
from pathlib import Path

from families import (  # noqa: F401  register
    captioners,
    cohere,
    gemma,
    glm,
    idefics,
    internvl,
    llama,
    llava,
    mistral,
    older,
    qwen,
    rare,
    recent,
)
from families.common import FAMILIES, build

__all__ = ["FAMILIES", "build"]

if __name__ == "__main__":
    for name in sys.argv[2:] or list(FAMILIES):
        began = time.monotonic()
        try:
            size = build(name, Path(sys.argv[1]) / name)
        except Exception:  # noqa: BLE001  every family is tried
            print(f"{name:20} FAILED", flush=True)
            traceback.print_exc(limit=-4)
        else:
            print(f"{name:20} {size:>10,} parameters, {time.monotonic() - began:.1f} s", flush=True)
