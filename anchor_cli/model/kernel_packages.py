"""Names of the flash-attn packages and how to install them, without importing torch."""

from __future__ import annotations

from importlib.util import find_spec

FLASH_MODULES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
    "varlen_fa4": "flash_attn.cute",
    "varlen_fa3": "flash_attn_interface",
}
"""The module that each `attn_implementation` of flash-attn imports."""
INSTALL_FLASH_ATTN = "pip install --pre flash-attn-4"
"""A wheel of pure Python for Hopper and Blackwell. flash-attn 2 compiles for an hour and gains nothing over torch's
varlen attention, which is the same kernel."""


def is_installed(module: str) -> bool:
    """Whether a module can be found; `flash_attn.cute` imports its parent package for that."""
    try:
        return find_spec(module) is not None
    except Exception:  # the parent package is missing, or fails when it is imported
        return False
