"""Which GPUs this machine has, and what GPUs can do, from their data sheets, for estimates on one that has none."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

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


def local_gpus() -> list[tuple[str, float]]:
    """(driver's name, memory in GiB) of the GPUs that a run here may use; empty without a driver. No torch.

    nvidia-smi names all of them, CUDA_VISIBLE_DEVICES those that are left, as in CUDA itself: by index or by the
    beginning of a UUID, up to the first name that is none. Where nvidia-smi is missing, as in a container with the
    `compute` capability only, the device files are counted: `unknown GPU`, 0 GiB.
    """
    command = ["nvidia-smi", "--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        files = [path for path in DEVICES.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
        return _visible([("unknown GPU", 0.0, "")] * len(files), os.environ.get("CUDA_VISIBLE_DEVICES"))
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in out.splitlines() if line.count(",") >= 2]
    found = [(name, float(mib) / 1024, uuid) for name, mib, uuid in rows if mib.isdigit()]
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(found: list[tuple[str, float, str]], wanted: str | None) -> list[tuple[str, float]]:
    if wanted is None:
        return [(name, memory_gib) for name, memory_gib, _ in found]
    visible: list[tuple[str, float]] = []
    for word in (part.strip() for part in wanted.split(",")):
        if word.isdigit() and int(word) < len(found):
            place = int(word)
        elif word.startswith("MIG-") and found:
            place = 0  # a slice of some card: one device, its card's name and memory are taken for its own
        else:
            place = next((at for at, (_, _, uuid) in enumerate(found) if word and uuid.startswith(word)), -1)
        if place < 0:
            break
        visible.append(found[place][:2])
    return visible
