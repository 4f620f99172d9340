"""constraints/oldest.txt names the lower bounds of pyproject.toml, each once and no other."""

import re
import tomllib

from helpers.experiment import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


def test_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["eval"]]):
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        bounds[requirement.name] = Version(lowest)
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z-]+==[0-9]+\.[0-9]+\.[0-9]+", line) for line in pinned)
    names = [line.split("==")[0] for line in pinned]
    assert names == list(bounds)
    assert {name: Version(line.split("==")[1]) for name, line in zip(names, pinned, strict=True)} == bounds
