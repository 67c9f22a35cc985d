"""The container files, as far as they can be checked without building: docker/test-image.sh builds the image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_is_copied_reaches_the_build() -> None:
    """.dockerignore leaves everything out and names what goes in: each COPY from the context must be named there."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
    copied = {source for line in copies for source in line.split()[:-1]}
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists(), source


def test_wheel_needs_nothing_that_is_not_copied() -> None:
    """hatchling's forced includes must be in the build's context too."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source in [*tool["force-include"], *tool["packages"]]:
        assert re.search(rf"^COPY .*\b{re.escape(source)}\b", DOCKERFILE, flags=re.MULTILINE), source


def test_requirements_are_those_of_the_project() -> None:
    done = subprocess.run(
        [sys.executable, "docker/requirements.py", "liger"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == [*project["dependencies"], *project["optional-dependencies"]["liger"]]


def test_runs_as_nobody_special_and_holds_no_secret() -> None:
    assert "USER 1000:1000" in DOCKERFILE and 'ENTRYPOINT ["anchor"]' in DOCKERFILE
    assert not re.search(r"(ARG|ENV)[^\n]*(TOKEN|API_KEY|PASSWORD|SECRET)", DOCKERFILE)


def test_script_and_files_are_well_formed() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "docker/test-image.sh")], check=True)
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["anchor"]
    assert service["shm_size"] == "16gb" and service["ulimits"]["nofile"] == 65536
    assert all("=" not in name for name in service["environment"]), "a value of a secret does not belong in the file"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
