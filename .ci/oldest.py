"""Print the oldest versions that pyproject.toml allows, as pip constraints for `make test-oldest`.

The dependencies of vlmtune stand at their lower bounds, its extras at the versions of
constraints.txt. torch stays at its tested version: another build of it would be several GB.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TESTED_ONLY = ("torch",)


def lower_bound(requirement: Requirement) -> str:
    """The version of `>=`. Raises ValueError if the requirement has none."""
    bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"pyproject.toml: {requirement} has no lower bound")
    return bounds[0]


def oldest_constraints() -> list[str]:
    """Lines of `name==version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    oldest = []
    for requirement in map(Requirement, project["dependencies"]):
        name = canonicalize_name(requirement.name)
        fixed = name in TESTED_ONLY
        oldest.append(tested[name] if fixed else f"{requirement.name}=={lower_bound(requirement)}")
    extras = [tool for extra in ("dev", "families") for tool in project["optional-dependencies"][extra]]
    tools = [canonicalize_name(Requirement(tool).name) for tool in extras]
    return [*oldest, *(tested[name] for name in tools)]


if __name__ == "__main__":
    print("\n".join(oldest_constraints()))
