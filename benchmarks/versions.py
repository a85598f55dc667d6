"""The libraries that a benchmark runs on: older ones than the project asks for make other figures, and no
error."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

NAMED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "ray")


def check_versions() -> None:
    """Print the versions on stderr; ends the benchmark where one is not what pyproject.toml asks for."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print(", ".join(f"{name} {version(name)}" for name in NAMED), file=sys.stderr, flush=True)
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in NAMED and not requirement.specifier.contains(
            version(requirement.name), prereleases=True
        ):
            sys.exit(f"{requirement.name} {version(requirement.name)} is here, and {requirement} is needed")
