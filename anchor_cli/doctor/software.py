"""Checks of Python, packages, DeepSpeed and compilers."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from anchor_cli.base.check import Check
from anchor_cli.doctor.needs import Needs
from anchor_cli.processes.extension_locks import extension_locks, stale_extension_locks
from anchor_cli.train.deepspeed_versions import TESTED as TESTED_DEEPSPEED
from anchor_cli.train.deepspeed_versions import refused_deepspeed, release_of

TESTED_PYTHON = ((3, 11), (3, 13))
"""Oldest and newest minor release of Python; the tests run on 3.11, the rest is an assumption."""

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "numpy": "2.4.6",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "sentence-transformers": "6.2.0",
    "wandb": "0.31.0",
}
"""The pins of constraints.txt that matter to a run (a test compares them)."""
INSTALL = "pip install -c constraints.txt . in the repository gives what is tested"
OPTIONAL = ("sentence-transformers", "wandb")


def python(_: Needs) -> Iterator[Check]:
    version = sys.version_info
    message = f"{version.major}.{version.minor}.{version.micro}"
    oldest, newest = TESTED_PYTHON
    if version[:2] < oldest:
        yield Check("python", "fail", message, f"install Python {oldest[0]}.{oldest[1]} or newer")
    elif version[:2] > newest:
        yield Check("python", "warn", f"{message}, newer than tested", f"prefer Python {newest[0]}.{newest[1]}")
    else:
        yield Check("python", "ok", message)


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(_: Needs) -> Iterator[Check]:
    """Same major.minor as tested is fine; older or newer is a warning, missing a failure."""
    installed = {name: version_of(name) for name in TESTED}
    missing = [name for name, version in installed.items() if version is None and name not in OPTIONAL]
    if missing:
        yield Check("packages", "fail", f"not installed: {', '.join(missing)}", INSTALL)
    other = [
        f"{name} {version} (tested {TESTED[name]})"
        for name, version in installed.items()
        if version is not None and release_of(version)[:2] != release_of(TESTED[name])[:2]
    ]
    if other:
        yield Check("packages", "warn", "; ".join(other), INSTALL)
    if not missing and not other:
        shown = [
            f"{name} {installed[name]}" for name in ("torch", "transformers", "datasets", "numpy") if installed[name]
        ]
        yield Check("packages", "ok", f"{', '.join(shown)}: as tested")


def deepspeed(_: Needs) -> Iterator[Check]:
    version = version_of("deepspeed")
    install = f"pip install deepspeed=={TESTED_DEEPSPEED}"
    if version is None:
        yield Check("deepspeed", "fail", "not installed", install)
        return
    reason = refused_deepspeed(version)
    if reason is not None:
        yield Check("deepspeed", "fail", f"refused: {reason}", install)
    elif release_of(version)[:2] != release_of(TESTED_DEEPSPEED)[:2]:
        yield Check("deepspeed", "warn", f"{version}, tested is {TESTED_DEEPSPEED}", "anchor doctor --gradients tells")
    else:
        yield Check("deepspeed", "ok", version)


def compiler(_: Needs) -> Iterator[Check]:
    """Triton (Liger, torch.compile) compiles a launcher with a C compiler and Python's headers at first use."""
    named = os.environ.get("CC")
    compiler_name = next((name for name in ([named] if named else ["gcc", "cc", "clang"]) if shutil.which(name)), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    install = "apt-get install gcc g++ python3-dev (or what your system calls them)"
    if compiler_name is None:
        which = f"CC={named} not found" if named else "no C compiler"
        yield Check("compiler", "warn", f"{which}: Triton kernels, Liger and torch_compile cannot be used", install)
    elif not headers:
        yield Check("compiler", "warn", f"{compiler_name}, but no Python.h: Triton kernels cannot be built", install)
    else:
        nvcc = shutil.which("nvcc")
        yield Check("compiler", "ok", f"{compiler_name} and Python headers" + (", nvcc" if nvcc else ""))


def compiler_locks(_: Needs) -> Iterator[Check]:
    stale = stale_extension_locks()
    if stale:
        names = ", ".join(str(path) for path in stale)
        yield Check("compiler locks", "fail", f"left by a killed build, later runs wait for ever: {names}",
                    f"rm {' '.join(str(path) for path in stale)} (anchor train does it at its start)")  # fmt: skip
        return
    held = len(extension_locks())
    yield Check("compiler locks", "ok", f"{held} held by a running build" if held else "none")
