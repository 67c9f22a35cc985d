"""The container files, as far as they can be checked without building: docker/test-image.sh builds the image."""

from __future__ import annotations

import json
import re
import shlex
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


Instruction = tuple[str, str]


def image(variant: str, **arguments: str) -> list[Instruction]:
    """What builds the last stage of the Dockerfile, from the base image on, arguments filled in."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    lines: list[Instruction] = re.findall(r"^([A-Z]+) +(.*)$", text, flags=re.MULTILINE)
    values = {"VARIANT": variant} | arguments
    stages: dict[str, list[Instruction]] = {}
    name = ""
    for word, rest in lines:
        if word == "ARG":
            key, _, default = rest.partition("=")
            values.setdefault(key, default)
        rest = re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], match[0]), rest)
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            stages[name] = list(stages.get(parent, []))
        elif name:
            stages[name].append((word, rest))
    return stages[name]


def environment(instructions: list[Instruction]) -> dict[str, str]:
    pairs = [shlex.split(rest) for word, rest in instructions if word == "ENV"]
    return {key: value for line in pairs for key, _, value in (pair.partition("=") for pair in line)}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_image_runs_anchor_as_user_1000_and_holds_no_secret(variant: str) -> None:
    made = image(variant)
    last = dict(made)
    assert json.loads(last["ENTRYPOINT"]) == ["anchor"] and last["USER"] == "1000:1000"
    names = [*environment(made), *(rest.partition("=")[0] for word, rest in made if word == "ARG")]
    assert not [name for name in names if re.search("TOKEN|API_KEY|PASSWORD|SECRET", name)]


def test_the_cuda_image_asks_for_its_driver_and_keeps_compiled_kernels_in_the_mounted_cache() -> None:
    got, cpu = environment(image("cuda")), environment(image("cpu"))
    assert got["NVIDIA_REQUIRE_CUDA"] == "cuda>=13.0" and "NVIDIA_REQUIRE_CUDA" not in cpu
    assert environment(image("cuda", REQUIRE_CUDA="cuda>=12.0"))["NVIDIA_REQUIRE_CUDA"] == "cuda>=12.0"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert got[name].startswith("/home/anchor/.cache/")
    assert got["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def installed(tmp_path: Path, line: str, **arguments: str) -> list[str]:
    """Run one RUN line of the CUDA builder with stand-ins for every program; the calls that it makes."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    log = tmp_path / "log"
    log.write_text("")
    for name in ("pip", "apt-get", "curl", "dpkg", "rm", "python3"):
        answer = "echo 13-0" if name == "python3" else "true"
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{answer}\n')
        (programs / name).chmod(0o755)
    defaults = {
        "FLASH_ATTN": "none",
        "TORCH_INDEX": "",
        "FLASH_ATTN_VERSION": "2",
        "FLASH_ATTN_CUDA_ARCHS": "90",
        "MAX_JOBS": "1",
    }
    shell = shutil.which("sh")
    assert shell is not None
    environment = {"PATH": str(programs), "MAX_JOBS": "1"} | defaults | arguments
    subprocess.run([shell, "-c", line], env=environment, cwd=tmp_path, check=True)
    return [call for call in log.read_text().splitlines() if call.startswith(("pip", "apt-get install"))]


def test_what_each_choice_of_flash_attention_and_torch_installs(tmp_path: Path) -> None:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    cuda = text[text.index("AS builder-cuda") : text.index("AS wheel")]
    torch, flash = re.findall(r"^RUN (.*)$", cuda, flags=re.MULTILINE)
    assert installed(tmp_path, flash) == []
    assert installed(tmp_path, flash, FLASH_ATTN="flash-attn-4") == [
        "pip install --pre --constraint constraints.txt flash-attn-4"
    ]
    wheel = installed(tmp_path, flash, FLASH_ATTN="https://x/flash.whl")
    assert wheel[0] == "pip install --no-deps https://x/flash.whl"
    built = installed(tmp_path, flash, FLASH_ATTN="build")
    assert built[-1] == "pip install --no-build-isolation --no-deps flash-attn==2"
    assert any("cuda-minimal-build-13-0" in call for call in built)
    assert "--extra-index-url" not in installed(tmp_path, torch)[0]
    assert "--extra-index-url https://x/cu126" in installed(tmp_path, torch, TORCH_INDEX="https://x/cu126")[0]


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
