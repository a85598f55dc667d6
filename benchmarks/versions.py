"""Check the libraries that a benchmark runs on: other versions give other figures without an error."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

NAMED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "ray")


def check_versions() -> None:
    """Print the versions on stderr. Ends the benchmark if pyproject.toml asks for another version."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print(", ".join(f"{name} {version(name)}" for name in NAMED), file=sys.stderr, flush=True)
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name not in NAMED:
            continue
        installed = version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            sys.exit(
                f"{requirement.name} {installed} is installed, but pyproject.toml asks for {requirement}"
            )
