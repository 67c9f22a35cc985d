"""What GPUs can do, from their data sheets: for estimates, and for the peak that MFU is a share of."""

from __future__ import annotations

from dataclasses import dataclass

from anchor_cli.base.errors import InputError, nearest


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
