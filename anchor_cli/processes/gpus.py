"""Which GPUs this machine has, by its driver, and whether this torch can use them; without importing torch."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import InputError

DEVICES = Path("/dev")
NEEDED_DRIVER = {12: "525", 13: "580"}
"""Oldest driver of each CUDA major release (CUDA compatibility guide, table of minor version compatibility)."""


@contextmanager
def nvml() -> Iterator[Any]:
    """NVIDIA's management library (`pynvml`), initialised; None without a driver, or where a container lacks it."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def local_gpus() -> list[tuple[str, float]]:
    """(driver's name, memory in GiB) of the GPUs that a run here may use; empty without a driver. No torch.

    NVML names all of them, CUDA_VISIBLE_DEVICES those that are left, as in CUDA itself: by index or by the beginning of
    a UUID, up to the first name that is none. Where NVML is missing, as in a container with the `compute` capability
    only, or fails, the device files are counted: `unknown GPU`, 0 GiB.
    """
    return [card[:2] for card in _visible(_all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))]


def _all_gpus() -> list[tuple[str, float, str]]:
    """(name, memory in GiB, UUID) of every GPU of this machine."""
    with nvml() as library:
        if library is not None:
            try:
                handles = [library.nvmlDeviceGetHandleByIndex(at) for at in range(library.nvmlDeviceGetCount())]
                return [
                    (
                        library.nvmlDeviceGetName(handle),
                        library.nvmlDeviceGetMemoryInfo(handle).total / 2**30,
                        library.nvmlDeviceGetUUID(handle),
                    )
                    for handle in handles
                ]
            except library.NVMLError:
                pass  # a card that fell off the bus: it counts, as for CUDA
    return [("unknown GPU", 0.0, "")] * sum(
        path.name.removeprefix("nvidia").isdigit() for path in DEVICES.glob("nvidia*")
    )


def _visible(cards: list[tuple[str, float, str]], selection: str | None) -> list[tuple[str, float, str]]:
    if selection is None:
        return cards
    visible: list[tuple[str, float, str]] = []
    for name in (part.strip() for part in selection.split(",")):
        if name.isdigit() and int(name) < len(cards):
            place = int(name)
        elif name.startswith("MIG-") and cards:
            place = 0  # a slice of some card: one device, its card's name and memory are taken for its own
        else:
            place = next((at for at, (_, _, uuid) in enumerate(cards) if name and uuid.startswith(name)), -1)
        if place < 0:
            break
        visible.append(cards[place])
    return visible


def on_gpu() -> bool:
    """Whether this process computes on GPUs; False where there are none, or CUDA_VISIBLE_DEVICES hides them.

    Raises:
        InputError: there are GPUs, and torch cannot use them; nothing falls back to the CPU unasked.
    """
    import torch

    if torch.cuda.is_available():
        return True
    if problem := cuda_problem(initialise=True):
        raise problem
    return False


def require_usable_gpus() -> None:
    """Raises InputError: there are GPUs, and torch cannot use them."""
    if problem := cuda_problem():
        raise problem


def cuda_problem(*, initialise: bool = False) -> InputError | None:
    """Why this torch cannot use the GPUs that are here, with the remedy; None where nothing speaks against it.

    `initialise` also starts the driver in this process and, where nothing else is wrong, blames that.
    """
    cards = local_gpus()
    if not cards:
        return None
    cuda, (torch_version, built) = _libcuda(), _torch_build()
    remedy, reason = "install the driver's user libraries", ""
    if built is None:
        reason = f"torch {torch_version} is built without CUDA"
        remedy = "install a build with CUDA (PyPI's torch has it)"
    elif cuda is None:
        reason = "the driver's libcuda.so.1 is not here"
        remedy = "give the container the compute capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    else:
        runs, needs = ctypes.c_int(), int(built.split(".")[0])
        cuda.cuDriverGetVersion(ctypes.byref(runs))
        if runs.value // 1000 < needs:
            newest = f"{runs.value // 1000}.{runs.value % 1000 // 10}"
            reason = f"driver {driver_version() or ''} runs CUDA {newest} at most, torch {torch_version} is built for "
            reason += f"CUDA {built}, which needs driver {NEEDED_DRIVER.get(needs, 'of that release')} or newer"
            index = f"https://download.pytorch.org/whl/cu{'118' if runs.value < 12000 else '126'}"
            remedy = f"update the driver, or pip install torch --index-url {index}"
        elif initialise:
            reason = f"the driver does not start: {_init_error(cuda)}"
            remedy = "nvidia-smi and dmesg say more"
    if not reason:
        return None
    number = f"{len(cards)} GPU{'s' if len(cards) > 1 else ''} ({cards[0][0]})"
    return InputError(f"{number} cannot be used: {reason}", f"{remedy}; --device cpu computes on the CPU")


def driver_version() -> str | None:
    """`580.95.05`, or None without a driver."""
    with nvml() as library:
        return None if library is None else str(library.nvmlSystemGetDriverVersion())


def _libcuda() -> Any:
    """The driver's library, which torch will load too; None: not here."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _init_error(cuda: Any) -> str:
    code, name = cuda.cuInit(0), ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return f"{name.value.decode() if name.value else 'unknown error'} ({code})"


def _torch_build() -> tuple[str, str | None]:
    """torch's version and the CUDA release it is built for, read from its files: importing it takes seconds."""
    spec = find_spec("torch")
    text = Path(str(spec.origin)).with_name("version.py").read_text(encoding="utf-8") if spec else ""
    version, cuda = (
        re.search(rf"^{key}\b[^=]*= ['\"]([^'\"]+)", text, re.MULTILINE) for key in ("__version__", "cuda")
    )
    return version[1] if version else "unknown", cuda[1] if cuda else None
