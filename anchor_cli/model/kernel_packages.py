"""Names of the flash-attn packages and how to install them, without importing torch."""

FLASH_MODULES = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""The module that each `attn_implementation` of flash-attn imports."""
INSTALL_FLASH_ATTN = "pip install flash-attn --no-build-isolation"
"""Its build needs the torch that is installed."""
