"""Checks of GPUs: driver, cards, bf16, links between them, and the kernels that will really run.

Written against NVIDIA's and PyTorch's documentation; the CUDA branches are unmeasured so far (no GPU in development).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from anchor_cli.base.check import Check
from anchor_cli.base.cpu import SLOW_BFLOAT16, has_fast_bfloat16
from anchor_cli.doctor.needs import Needs
from anchor_cli.doctor.software import version_of
from anchor_cli.model.kernel_packages import INSTALL_FLASH_ATTN
from anchor_cli.processes.gpus import cuda_problem, driver_version, nvml

GIB = 1 << 30
TOPOLOGY = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""NVML's `nvmlGpuTopologyLevel_t`, by the names of `nvidia-smi topo -m`."""
LITTLE_FREE = 0.9
"""Below this free share of its memory another process uses the card (assumption)."""


def handle_of(library: Any, index: int) -> Any:
    """NVML's handle of torch's GPU `index`, whose numbers differ under CUDA_VISIBLE_DEVICES."""
    import torch

    return library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def gpus(needs: Needs) -> Iterator[Check]:
    import torch

    driver = driver_version()
    if not torch.cuda.is_available():
        if problem := cuda_problem(initialise=True):
            yield Check("driver", "fail", problem.message, problem.hint)
        else:
            yield Check("GPUs", "warn", "none: training runs on the CPU, which is for demos and tests",
                        "for real runs use a host with NVIDIA GPUs (docker run --gpus all)")  # fmt: skip
            if needs.precision == "bfloat16" and not has_fast_bfloat16():
                yield Check("precision", "warn", SLOW_BFLOAT16, "precision: float32 for a run on this CPU")
        return
    yield Check("driver", "ok", f"{driver or 'version unknown'}, torch built for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        yield from _one_gpu(index)


def _one_gpu(index: int) -> Iterator[Check]:
    import torch

    name = f"GPU {index}"
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    message = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        yield Check(name, "fail", f"{message}: no bf16 (compute capability {capability[0]}.{capability[1]})",
                    "precision: float32, or a card from Ampere (A100) on")  # fmt: skip
    elif free / total < LITTLE_FREE:
        yield Check(
            name, "warn", f"{message}: another process is on it", "nvidia-smi shows which; CUDA_VISIBLE_DEVICES"
        )
    else:
        yield Check(name, "ok", f"{message}, bf16")
    if errors := uncorrected_errors(index):
        yield Check(f"{name} ECC", "fail", f"{errors} uncorrected memory errors since boot", "take the card out of use")


def uncorrected_errors(index: int) -> int:
    """ECC errors since boot that were not corrected; 0 where the card does not count them."""
    with nvml() as library:
        if library is None:
            return 0
        try:
            kinds = library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, library.NVML_VOLATILE_ECC
            return int(library.nvmlDeviceGetTotalEccErrors(handle_of(library, index), *kinds))
        except library.NVMLError:
            return 0


def link_between(library: Any, one: int, other: int) -> str:
    """How two GPUs are connected, named as in `nvidia-smi topo -m`: NV<n> is n NVLinks, else a path over PCIe."""
    try:
        here, there = handle_of(library, one), handle_of(library, other)
        if (
            library.nvmlDeviceGetP2PStatus(here, there, library.NVML_P2P_CAPS_INDEX_NVLINK)
            == library.NVML_P2P_STATUS_OK
        ):
            return f"NV{num_links(library, here, there)}"
        return TOPOLOGY.get(library.nvmlDeviceGetTopologyCommonAncestor(here, there), "?")
    except library.NVMLError:
        return "?"


def num_links(library: Any, here: Any, there: Any) -> int:
    """Active NVLinks from one card to the other; behind an NVSwitch, where each leads to the switch, all of them."""

    def address(pci: Any) -> tuple[int, int, int]:
        return pci.domain, pci.bus, pci.device

    ends = []
    for link in range(library.NVML_NVLINK_MAX_LINKS):
        try:
            if library.nvmlDeviceGetNvLinkState(here, link):
                ends.append(address(library.nvmlDeviceGetNvLinkRemotePciInfo(here, link)))
        except library.NVMLError:  # this card has fewer links
            break
    return ends.count(address(library.nvmlDeviceGetPciInfo(there))) or len(ends)


def links(_: Needs) -> Iterator[Check]:
    """P2P between every two GPUs, and whether NVLink carries it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    with nvml() as library:
        paths = {pair: "?" if library is None else link_between(library, *pair) for pair in pairs}
    slow = [pair for pair in pairs if not paths[pair].startswith("NV")]
    kinds = ", ".join(sorted({*paths.values()} - {"?"})) or "unknown"
    if without:
        named = ", ".join(f"{a}-{b}" for a, b in without[:4])
        yield Check("GPU links", "warn", f"no peer access between {named} ({kinds}): slow",
                    "turn IOMMU/ACS off in the BIOS, or take cards of one switch; see NCCL_DEBUG=INFO")  # fmt: skip
    elif slow:
        named = ", ".join(f"{a}-{b} {paths[a, b]}" for a, b in slow[:4])
        yield Check("GPU links", "warn", f"peer access, but no NVLink between {named}",
                    "fine for 0.6B parameters; for larger models take cards with a bridge (H100 NVL)")  # fmt: skip
    else:
        yield Check("GPU links", "ok", f"peer access and NVLink between all {count} ({kinds})")


def attention_kernel(needs: Needs) -> Iterator[Check]:
    """The kernel a run would use, run on four texts and compared with one SDPA a text in float32."""
    import torch

    from anchor_cli.model import attention

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = attention.choose_kernel(needs.attn_implementation, device, torch.bfloat16)
    lengths = (5, 1, 130, 64)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(total, heads, 64, generator=generator).to(device, torch.bfloat16) for heads in (8, 4, 4)
    )
    bounds = torch.tensor([0, 5, 6, 136, 200], dtype=torch.int32, device=device)
    packing = attention.Packing(bounds, lengths, name)
    got = attention.KERNELS[name](query, key, value, packing, 0.125).float()
    want = attention.sdpa_kernel(query.float(), key.float(), value.float(), packing, 0.125)
    error = float((got - want).abs().max())
    asked = "" if needs.attn_implementation in ("auto", name) else f" (asked for {needs.attn_implementation})"
    message = f"{name}{asked}, largest error {error:.1e} in bf16"
    if error > 0.05:  # bf16 keeps 8 bits: values up to 4 are off by up to 2^-7 x 4
        yield Check("attention kernel", "fail", message, "rebuild flash-attn, or attn_implementation: varlen")
    elif on_gpu and name == "sdpa":
        yield Check("attention kernel", "warn", f"{message}: one call a text, slow on a GPU", INSTALL_FLASH_ATTN)
    elif asked and on_gpu:
        yield Check("attention kernel", "warn", message, f"{INSTALL_FLASH_ATTN}, or attn_implementation: auto")
    else:
        yield Check("attention kernel", "ok", message)


def liger(_: Needs) -> Iterator[Check]:
    """Liger's fused RMSNorm against PyTorch's arithmetic, when there is a GPU to run it on."""
    import torch

    version = version_of("liger-kernel")
    if not torch.cuda.is_available():
        return
    if version is None or find_spec("liger_kernel") is None:
        yield Check("Liger", "warn", "not installed: norms and activations are not fused", "pip install liger-kernel")
        return
    from anchor_cli.model.liger import REMEDY, liger_problem

    if problem := liger_problem(torch.device("cuda")):
        yield Check("Liger", "fail" if "off by" in problem else "warn", f"{version}: {problem}", REMEDY)
    else:
        yield Check("Liger", "ok", f"{version}, RMSNorm forward and backward as PyTorch's")
