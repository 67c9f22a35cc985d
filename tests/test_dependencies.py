"""The stated ranges of versions: the tested set lies inside them, and their lower bounds resolve together."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_tested_version_is_in_the_stated_range(requirement: Requirement) -> None:
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    assert pins[requirement.name.replace("_", "-").lower()] in requirement.specifier


@pytest.mark.parametrize("name", ["transformers", "datasets", "tokenizers", "deepspeed", "wandb"])
def test_installed_libraries_accept_each_other(name: str) -> None:
    """What each of them requires of the others that we name is what is installed here."""
    ours = {requirement.name.replace("_", "-").lower() for requirement in REQUIREMENTS}
    for line in metadata.requires(name) or []:
        needed = Requirement(line)
        if needed.name.replace("_", "-").lower() in ours and (needed.marker is None or needed.marker.evaluate()):
            assert needed.specifier.contains(metadata.version(needed.name), prereleases=True), f"{name}: {line}"


@pytest.mark.slow
def test_the_lower_bounds_resolve_together(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "index", "versions", "psutil"], capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    lowest = [f"{r.name}=={next(s.version for s in r.specifier if s.operator == '>=')}" for r in REQUIREMENTS]
    (tmp_path / "lowest.txt").write_text("\n".join(lowest))
    done = subprocess.run(
        [*pip, "install", "--dry-run", "--quiet", "--ignore-installed", "--requirement", str(tmp_path / "lowest.txt")],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
