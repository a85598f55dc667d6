"""Imports run one way, and what prepares a row, a batch or a model does not import Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package may import those of a lower number, and itself.
LAYERS = {
    "vlmtune.stop_signals": -1, "vlmtune.shown_text": -1,
    "vlmtune.faults": 0, "vlmtune.checksums": 0, "vlmtune.standard_error": 0,
    "vlmtune.folder_lock": 1, "vlmtune.folder_owner": 1, "vlmtune.private_ray": 1, "vlmtune.ray_watch": 1,
    "vlmtune.run_state": 5,
    "vlmtune.errors": 0, "vlmtune.html_page": 0, "vlmtune.background": 0, "vlmtune.storage": 0,
    "vlmtune.compat": 0, "vlmtune.hub": 0, "vlmtune.progress": 0,
    "vlmtune.library_errors": 0.5, "vlmtune.image_resolution": 0.5, "vlmtune.model_ref": 1,
    "vlmtune.console": 1, "vlmtune.cluster": 2, "vlmtune.config": 2, "vlmtune.data": 3,
    "vlmtune.output": 4, "vlmtune.trackers": 4,
    "vlmtune.model": 5, "vlmtune.session": 6, "vlmtune.evaluation": 7, "vlmtune.training": 8,
    "vlmtune.packed": 9, "vlmtune.single_run": 10,
    "vlmtune.search": 11, "vlmtune.ui": 13, "vlmtune.preflight": 12, "vlmtune.api": 13, "vlmtune.cli": 14,
    "vlmtune.__main__": 15, "ray_jobs": 15,
}  # fmt: skip
# Every module's import imports these, but they import libraries only when their functions are called, which
# tests/test_api.py holds.
PUBLIC_API = ("vlmtune", "vlmtune.api")
DEMO_IMPORTS = {"vlmtune.errors", "vlmtune.data", "vlmtune.demo"}
WITHOUT_RAY = [
    *("vlmtune.errors", "vlmtune.config", "vlmtune.model"),
    *(
        f"vlmtune.evaluation.{name}"
        for name in ("text", "numbers", "metrics", "generate", "questions", "adapter", "options")
    ),
    *(
        f"vlmtune.data.{name}"
        for name in ("tokenize", "encoded_example", "order", "collate", "formats", "scan", "images", "split")
    ),
    *(f"vlmtune.packed.{name}" for name in ("layers", "optim", "loss")),
]


def read_sources() -> dict[str, str]:
    """The text of every module, by its full name; a package by the name of its folder."""
    sources = {}
    for path in [*(ROOT / "vlmtune").rglob("*.py"), *(ROOT / "ray_jobs").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def imported(source: str, module: str) -> set[str]:
    """The full names that a module imports, wherever in it; `from a import b` counts as a.b, for b may be a
    module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            names |= {
                ".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names
            }
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def package_of(name: str) -> str | None:
    return next((package for package in [*LAYERS, "vlmtune.demo"] if inside(name, package)), None)


def may_import(importer: str | None, target: str) -> bool:
    if importer is None or target == importer:  # the root package is covered by tests/test_api.py
        return True
    if importer == "vlmtune.demo":
        return target in DEMO_IMPORTS
    if target == "vlmtune.demo":  # `vlmtune demo` writes its files
        return importer == "vlmtune.cli"
    return LAYERS[target] < LAYERS[importer]


def broken_layers(sources: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, source in sorted(sources.items())
        for name in sorted(imported(source, module))
        if (target := package_of(name)) and not may_import(package_of(module), target)
    ]


def ray_imports(sources: dict[str, str]) -> list[str]:
    """The modules of WITHOUT_RAY that import ray, themselves or through other modules of vlmtune and the
    packages that hold those."""
    found = []
    for module in sorted(name for name in sources if any(inside(name, wanted) for wanted in WITHOUT_RAY)):
        seen, waiting = set(), [module]
        while waiting:
            current = waiting.pop()
            if current in seen or current not in sources or current in PUBLIC_API:
                continue
            seen.add(current)
            names = imported(sources[current], current)
            found += [
                f"{module} imports {name} in {current}" for name in sorted(names) if inside(name, "ray")
            ]
            for name in {*names, current}:
                parts = name.split(".")
                waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return found


def test_imports_run_one_way() -> None:
    assert broken_layers(read_sources()) == []


def test_what_needs_no_cluster_does_not_import_ray() -> None:
    assert ray_imports(read_sources()) == []


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("vlmtune.packed.packed_trial", "torch transformers"),
        (
            "vlmtune.packed.engine_actor",
            "torch transformers",
        ),  # what is given an engine's handle imports its module
        ("vlmtune.data.stream", "transformers peft bitsandbytes trl"),
        ("vlmtune.search.isolated_trial", "transformers peft bitsandbytes trl"),
    ],
)
def test_processes_that_only_drive_or_read_start_fast(module: str, left_out: str) -> None:
    """A search starts several of them at once, and each of these libraries takes seconds and some 100 MB."""
    code = f"import {module}, sys; print(*(name for name in {left_out.split()} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_every_package_has_its_layer() -> None:
    known = [*LAYERS, "vlmtune.demo", "vlmtune"]
    assert {
        module for module in read_sources() if package_of(module) is None and module not in known
    } == set()


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("vlmtune.data.order", "import vlmtune.model.lora", True),
        ("vlmtune.data.order", "from vlmtune import config", False),
        ("vlmtune.data.order", "from ..search import tuner", True),
        ("vlmtune.data.order", "from .split import split", False),
        ("vlmtune.model.base", "def load():\n    from vlmtune.training.loop import run", True),
        (
            "vlmtune.model.base",
            "from vlmtune.errors import ModelError\nfrom vlmtune.data.tokenize import encode",
            False,
        ),
        ("vlmtune.training.loop", "import vlmtune.packed.engine", True),
        ("vlmtune.evaluation.metrics", "from vlmtune.search.trial_results import best_trial", True),
        ("vlmtune.search.space", "from vlmtune.config import SearchArguments", False),
        ("vlmtune.config", "from vlmtune.errors import ConfigError", False),
        ("vlmtune.config", "from vlmtune.data.formats import read", True),
        ("vlmtune.errors", "import vlmtune.config", True),
        ("vlmtune.search.tuner", "import ray_jobs.train", True),
        ("vlmtune.search.refit", "from vlmtune.api import train", True),
        ("vlmtune.session", "from vlmtune.training.save import describe", True),
        ("ray_jobs.tune", "from vlmtune.cli.commands import tune\nfrom vlmtune.config import parse", False),
        ("ray_jobs.tune", "from vlmtune.demo import mall", True),
        ("vlmtune.data.formats", "from vlmtune.demo.mall import MESSAGES", True),
        ("vlmtune.demo.models", "from vlmtune.demo.tiny_tokenizer import sample_texts", False),
        ("vlmtune.demo.models", "from vlmtune.model.lora import attach", True),
    ],
)
def test_a_broken_layer_is_found(module: str, source: str, broken: bool) -> None:
    assert bool(broken_layers({module: source})) == broken


@pytest.mark.parametrize(
    ("sources", "broken"),
    [
        ({"vlmtune.data.tokenize": "import ray"}, True),
        ({"vlmtune.data.tokenize": "import rayon"}, False),
        ({"vlmtune.model.memory": "def probe():\n    from ray import train"}, True),
        ({"vlmtune.packed.optim": "import ray.tune"}, True),
        ({"vlmtune.packed.engine": "import ray"}, False),
        ({"vlmtune.data.prepare": "import ray", "vlmtune.data.order": ""}, False),
        (
            {
                "vlmtune.data.prepare": "import ray",
                "vlmtune.data.order": "from vlmtune.data.prepare import rows",
            },
            True,
        ),
        ({"vlmtune.data": "import ray", "vlmtune.data.order": ""}, True),
    ],
)
def test_a_module_that_reaches_ray_is_found(sources: dict[str, str], broken: bool) -> None:
    assert bool(ray_imports(sources)) == broken
