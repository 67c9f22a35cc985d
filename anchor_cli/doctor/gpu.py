"""Doctor's questions about GPUs: driver, cards, bf16, links between them, and the kernels that will really run.

Written against NVIDIA's and PyTorch's documentation; the CUDA branches are unmeasured so far (no GPU in development).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec

from anchor_cli.base.check import Check
from anchor_cli.doctor.needs import Wishes
from anchor_cli.doctor.software import version_of
from anchor_cli.model.kernel_packages import INSTALL_FLASH_ATTN

GIB = 1 << 30
LITTLE_FREE = 0.9
"""Below this free share of a card somebody else is on it (assumption)."""


def smi(*arguments: str) -> str | None:
    """What `nvidia-smi` prints, or None when it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def uuid_of(index: int) -> str:
    """nvidia-smi's name of torch's GPU `index`, whose numbers differ under CUDA_VISIBLE_DEVICES: `GPU-5a1b…`."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def physical_numbers(listed: str) -> dict[str, int]:
    """`nvidia-smi --query-gpu=uuid,index --format=csv,noheader` -> {"GPU-5a1b…": 3}."""
    rows = [line.split(",") for line in listed.splitlines() if line.count(",") == 1]
    return {uuid.strip(): int(index) for uuid, index in rows if index.strip().isdigit()}


def gpus(_: Wishes) -> Iterator[Check]:
    import torch

    driver = smi("--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver:
            built = "has no CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
            yield Check("driver", "fail", f"driver {driver.splitlines()[0]}, but torch {torch.__version__} {built}",
                        "install the torch build that fits the driver: https://pytorch.org/get-started")  # fmt: skip
        else:
            yield Check("GPUs", "warn", "none: training runs on the CPU, which is for demos and tests",
                        "for real runs use a host with NVIDIA GPUs (docker run --gpus all)")  # fmt: skip
        return
    version = (driver or "version unknown").splitlines()[0]
    yield Check("driver", "ok", f"{version}, torch built for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        yield from _one_gpu(index)


def _one_gpu(index: int) -> Iterator[Check]:
    import torch

    name = f"GPU {index}"
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    said = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        yield Check(name, "fail", f"{said}: no bf16 (compute capability {capability[0]}.{capability[1]})",
                    "precision: float32, or a card from Ampere (A100) on")  # fmt: skip
    elif free / total < LITTLE_FREE:
        yield Check(name, "warn", f"{said}: another process is on it", "nvidia-smi shows which; CUDA_VISIBLE_DEVICES")
    else:
        yield Check(name, "ok", f"{said}, bf16")
    errors = smi("-i", uuid_of(index), "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")
    if errors and errors.isdigit() and int(errors) > 0:
        yield Check(f"{name} ECC", "fail", f"{errors} uncorrected memory errors since boot", "take the card out of use")


def parse_links(topology: str) -> dict[tuple[int, int], str]:
    """`nvidia-smi topo -m` -> {(0, 1): "NV12"}: NV<n> is n NVLinks, SYS/NODE/PHB/PXB/PIX are ways over PCIe."""
    links: dict[tuple[int, int], str] = {}
    columns: list[int] | None = None
    for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines():
        cells = line.split()
        if columns is None:
            heads = [cell for cell in cells if re.fullmatch(r"GPU\d+", cell)]
            if heads:
                columns = [int(head[3:]) for head in heads]
            continue
        match = re.match(r"GPU(\d+)$", cells[0]) if cells else None
        if match is None:
            continue
        row = int(match.group(1))
        for column, cell in zip(columns, cells[1:], strict=False):
            if row < column:
                links[row, column] = cell
    return links


def links(_: Wishes) -> Iterator[Check]:
    """P2P between every two GPUs, and whether NVLink carries it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    numbers = physical_numbers(smi("--query-gpu=uuid,index", "--format=csv,noheader") or "")
    here = [numbers.get(uuid_of(index), index) for index in range(count)]
    table = parse_links(smi("topo", "-m") or "")
    listed = {(a, b): (min(here[a], here[b]), max(here[a], here[b])) for a, b in pairs}
    ways = {pair: table[listed[pair]] for pair in pairs if listed[pair] in table}
    slow = [pair for pair in pairs if not ways.get(pair, "").startswith("NV")]
    kinds = ", ".join(sorted({ways[pair] for pair in pairs if pair in ways})) or "unknown"
    if without:
        named = ", ".join(f"{a}-{b}" for a, b in without[:4])
        yield Check("GPU links", "warn", f"no peer access between {named} ({kinds}): slow",
                    "turn IOMMU/ACS off in the BIOS, or take cards of one switch; see NCCL_DEBUG=INFO")  # fmt: skip
    elif slow:
        named = ", ".join(f"{a}-{b} {ways.get((a, b), '?')}" for a, b in slow[:4])
        yield Check("GPU links", "warn", f"peer access, but no NVLink between {named}",
                    "fine for 0.6B parameters; for larger models take cards with a bridge (H100 NVL)")  # fmt: skip
    else:
        yield Check("GPU links", "ok", f"peer access and NVLink between all {count} ({kinds})")


def attention_kernel(wishes: Wishes) -> Iterator[Check]:
    """The kernel a run would use, run on four texts and compared with one SDPA a text in float32."""
    import torch

    from anchor_cli.model import attention

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = attention.choose_kernel(wishes.attn_implementation, device, torch.bfloat16)
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
    asked = "" if wishes.attn_implementation in ("auto", name) else f" (asked for {wishes.attn_implementation})"
    said = f"{name}{asked}, largest error {error:.1e} in bf16"
    if error > 0.05:  # bf16 keeps 8 bits: values up to 4 are off by up to 2^-7 x 4
        yield Check("attention kernel", "fail", said, "rebuild flash-attn, or attn_implementation: varlen")
    elif on_gpu and name == "sdpa":
        yield Check("attention kernel", "warn", f"{said}: one call a text, slow on a GPU", INSTALL_FLASH_ATTN)
    elif asked and on_gpu:
        yield Check("attention kernel", "warn", said, f"{INSTALL_FLASH_ATTN}, or attn_implementation: auto")
    else:
        yield Check("attention kernel", "ok", said)


def liger(_: Wishes) -> Iterator[Check]:
    """Liger's fused RMSNorm against PyTorch's own, when there is a GPU to run it on."""
    import torch

    version = version_of("liger-kernel")
    if not torch.cuda.is_available():
        return
    if version is None or find_spec("liger_kernel") is None:
        yield Check("Liger", "warn", "not installed: norms and activations are not fused", "pip install liger-kernel")
        return
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    hidden = torch.randn(64, 256, device="cuda")
    norm = LigerRMSNorm(256, eps=1e-6).cuda()
    want = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    error = float((norm(hidden) - want).abs().max())
    if error > 1e-3:
        yield Check("Liger", "fail", f"{version}: RMSNorm is off by {error:.1e}", "pip install -U liger-kernel")
    else:
        yield Check("Liger", "ok", f"{version}, RMSNorm error {error:.1e}")
