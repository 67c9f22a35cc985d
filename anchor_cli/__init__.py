"""Stage I of Anchor Embedding: train embedding language models by bidirectional reconstruction.

For Python (docs/python.md): `load_embedder`, `load_benchmarks` and `AnchorError`, imported when they are used.
"""

from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "AnchorError": "anchor_cli.base.errors",
    "load_benchmarks": "anchor_cli.data.benchmarks.benchmarks",
    "load_embedder": "anchor_cli.evaluate.embedder",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anchor_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
