"""`report.html` beside prepared data: lengths, languages, rejections and ten rows as the model sees them.

One file without scripts or outside resources. It is a function of the prepared folder alone, so it is the same bytes
whenever it is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.checks import REASONS
from anchor_cli.data.prepare.summary import SIDES
from anchor_cli.data.text import Int32Array, load_tokenizer
from anchor_cli.report.render import render

NUM_SAMPLES = 10
_SHOWN_TOKENS = 90  # of a text: this many from its beginning, then [EOS]


def write_html(path: Path, pairs: PreparedPairs, tokenizer: str | Path) -> None:
    """Write the page for a prepared folder."""
    page = render(
        "prepared.html.j2",
        num_rows=pairs.num_rows,
        fingerprint=pairs.fingerprint,
        manifest=pairs.manifest,
        limit=pairs.contract.max_seq_length,
        reasons=REASONS,
        samples=_samples(pairs, load_tokenizer(tokenizer)),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _samples(pairs: PreparedPairs, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """For each of ten rows its query and its document."""
    rows = np.unique(np.linspace(0, pairs.num_rows - 1, NUM_SAMPLES).astype(np.int64))
    queries, documents = pairs.tokens(rows)
    return [
        [
            {"row": row, "language": pairs.texts(row)[2], "side": side, **_as_tokens(ids, start, tokenizer)}
            for side, ids, start in zip(SIDES, texts, pairs.content_starts(row), strict=True)
        ]
        for row, *texts in zip(rows.tolist(), queries, documents, strict=True)
    ]


def _as_tokens(ids: Int32Array, content_start: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A text as (text, style class) of its tokens; tokens that are parts of one character are put together."""
    shown = ids[:-1][:_SHOWN_TOKENS].tolist()
    tokens: list[tuple[str, str]] = []
    together: list[int] = []
    for at, token in enumerate(shown):
        together.append(token)
        text = tokenizer.decode(together, skip_special_tokens=False)
        if "\ufffd" in text and at + 1 < len(shown) and len(together) < 8:
            continue  # the rest of the character is in the next token
        first = at + 1 - len(together)
        style = "frame" if first < content_start else f"content{' odd' if first % 2 else ''}"
        tokens.append((text.replace("\n", "↵\n"), style))
        together = []
    return {
        "num_tokens": len(ids),
        "content_start": content_start,
        "tokens": tokens,
        "num_left_out": len(ids) - 1 - len(shown),
        "closing": tokenizer.decode([int(ids[-1])], skip_special_tokens=False),
    }
