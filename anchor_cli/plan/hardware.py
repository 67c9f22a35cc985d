"""Which GPUs this machine has, and what GPUs can do, from their data sheets, for estimates on one that has none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import InputError, nearest

DEVICES = Path("/dev")


@dataclass(frozen=True)
class Gpu:
    """One kind of card. Dense bf16 peak in TFLOP/s, memory in GiB (as sold: "80 GB" is 80 GiB), link to its neighbours
    in GB/s, one direction."""

    name: str
    memory_gib: float
    bf16_tflops: float
    link_gb_s: float


# NVIDIA data sheets; tensor-core peaks without sparsity (the sheets of Hopper print the sparse figure, twice as large).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-nvl", 94, 835, 300),
        Gpu("h100-sxm", 80, 989, 450),
        Gpu("h100-pcie", 80, 756, 64),
        Gpu("h200-sxm", 141, 989, 450),
        Gpu("h200-nvl", 141, 835, 450),
        Gpu("gh200", 96, 989, 450),
        Gpu("b200", 180, 2250, 900),
        Gpu("a100-80gb", 80, 312, 300),
        Gpu("a100-40gb", 40, 312, 300),
        Gpu("l40s", 48, 362, 32),
        Gpu("rtx4090", 24, 165, 32),
    )
}


def gpu_named(name: str) -> Gpu:
    """The card of this name. Raises InputError with the nearest name."""
    if name in GPUS:
        return GPUS[name]
    near = nearest(name, GPUS)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(GPUS)}"
    raise InputError(f"--gpu {name}: no such GPU is known", hint=hint)


def gpu_of_device_name(device_name: str) -> Gpu | None:
    """The card behind a driver's name such as `NVIDIA H100 80GB HBM3`, or None."""
    name = device_name.lower()
    rules = (
        (("h100", "nvl"), "h100-nvl"), (("h100", "pcie"), "h100-pcie"), (("h100",), "h100-sxm"),
        (("h200", "nvl"), "h200-nvl"), (("gh200",), "gh200"), (("h200",), "h200-sxm"), (("b200",), "b200"),
        (("a100", "80gb"), "a100-80gb"), (("a100",), "a100-40gb"), (("l40s",), "l40s"), (("4090",), "rtx4090"),
    )  # fmt: skip
    return next((GPUS[key] for words, key in rules if all(word in name for word in words)), None)


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
