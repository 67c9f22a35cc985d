"""Whether a tokenizer fits its model and can be exported: refused at the start, not at the first such text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anchor_cli.base.errors import InputError

_NOT_EXPORTABLE = {
    "Prepend": "puts {prepend!r} before every piece of text, also behind special tokens",
    "Strip": "strips every piece of text, also behind special tokens",
}
"""Normalisers that act on the pieces between special tokens. An export's tokenizer cannot: it normalises the whole
string before it looks for special tokens (export/tokenizer.py)."""


def require_ids_within(tokenizer: Tokenizer, num_rows: int | None, model: str | Path) -> None:
    """Refuse a tokenizer with token ids beyond the model's embedding; None: its number of rows is not known.

    Raises:
        InputError: the first such token.
    """
    if num_rows is None:
        return
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= num_rows)
    if beyond:
        index, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise InputError(
            f"{model}: its tokenizer has token {token!r} with id {index}{more}, and its embedding has {num_rows} rows",
            hint="give the model a row for each (resize_token_embeddings) or take the token out of tokenizer.json",
        )


def embedding_rows(model: str | Path) -> int | None:
    """Rows of the embedding by the config.json of a local folder, None where that does not say."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return rows if isinstance(rows, int) else None


def require_exportable(tokenizer: Tokenizer, model: str | Path) -> None:
    """Refuse a tokenizer that `anchor export` could never repeat in other tools.

    Raises:
        InputError: the normaliser that is in the way.
    """
    normaliser = tokenizer.normalizer
    for step in _normalisers(json.loads(normaliser.__getstate__()) if normaliser is not None else None):
        if step["type"] in _NOT_EXPORTABLE:
            reason = _NOT_EXPORTABLE[step["type"]].format(**step)
            raise InputError(
                f"{model}: its tokenizer's normaliser {step['type']} {reason}; no export could give others these ids",
                hint="take a model whose tokenizer has no such step, such as Qwen3, Llama 3, Gemma or Mistral v0.3",
            )


def _normalisers(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["normalizers"]:
            yield from _normalisers(inner)
    else:
        yield step
