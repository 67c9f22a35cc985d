"""What this host's processor computes fast."""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SLOW_BFLOAT16 = "bfloat16 on a CPU without instructions for it: measured 17 times slower than float32"


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AMX, AVX512-BF16, or Arm's bf16); True where nothing says."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = {flag for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for flag in line.split()}
    return not flags or bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
