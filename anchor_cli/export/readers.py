"""An export as others read it: token ids and vectors of texts by plain transformers and by sentence-transformers.

Knows nothing of anchor, so that it also runs where only an older transformers is installed:

    python readers.py EXPORT TEXTS.json OUT.json     TEXTS: [{"prompt_name", "prompt", "texts", "content_starts"}, …]
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

BATCH_SIZES = ((1, "left"), (32, "left"), (32, "right"))
"""(texts a batch, padding side); alone a text is not padded."""
_DTYPE = {"dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype": torch.float32}

Group = dict[str, Any]
Reading = tuple[int, str, list[list[int]], list[list[float]]]
"""Batch size, padding side; ids and vector of every text, group by group."""


def by_transformers(folder: str, groups: list[Group], pooling_mode: str) -> Iterator[Reading]:
    """`AutoTokenizer` and `AutoModel`, longest texts first, and the pooling written out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, **_DTYPE)
    starts = [start for group in groups for start in group["content_starts"]]
    texts = [group["prompt"] + text for group in groups for text in group["texts"]]
    longest_first = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    for batch_size, side in BATCH_SIZES:
        tokenizer.padding_side = side
        ids: list[list[int]] = [[] for _ in texts]
        vectors: list[list[float]] = [[] for _ in texts]
        for begin in range(0, len(texts), batch_size):
            chosen = longest_first[begin : begin + batch_size]
            batch = tokenizer([texts[index] for index in chosen], padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            for row, index in enumerate(chosen):
                kept = batch["attention_mask"][row].bool()
                ids[index] = batch["input_ids"][row][kept].tolist()
                vectors[index] = _pooled(states[row][kept].double(), starts[index], pooling_mode).tolist()
        yield batch_size, side, ids, vectors


def _pooled(states: torch.Tensor, content_start: int, mode: str) -> torch.Tensor:
    """(n, D) states of one text without padding -> (D,). The export appends [EOS] in `eos_token` mode only."""
    if mode in ("eos_token", "last_token"):
        return states[-1]
    content = states[content_start:]
    weights = (
        torch.arange(1, len(content) + 1).double() if mode == "weighted_mean" else torch.ones(len(content)).double()
    )
    return (content * weights[:, None]).sum(dim=0) / weights.sum()


def by_sentence_transformers(folder: str, groups: list[Group]) -> Iterator[Reading]:
    """`SentenceTransformer.encode` with the export's own prompts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", trust_remote_code=True, model_kwargs=_DTYPE)
    for batch_size, side in BATCH_SIZES:
        model.tokenizer.padding_side = side
        ids: list[list[int]] = []
        vectors: list[list[float]] = []
        for group in groups:
            for text in group["texts"]:
                if hasattr(model, "preprocess"):
                    features = model.preprocess([text], prompt=group["prompt"])
                else:  # before 5.4
                    features = model.tokenize([group["prompt"] + text])
                ids.append(features["input_ids"][0].tolist())
            encoded = model.encode(group["texts"], prompt_name=group["prompt_name"], batch_size=batch_size)
            vectors += encoded.tolist()
        yield batch_size, side, ids, vectors


def main(folder: str, texts: str, out: str) -> None:
    """Every reading by both libraries, and their versions, as JSON."""
    groups = json.loads(Path(texts).read_text(encoding="utf-8"))
    mode = json.loads((Path(folder) / "anchor.json").read_text(encoding="utf-8"))["pooling_mode"]
    readings: dict[str, Any] = {
        "transformers": list(by_transformers(folder, groups, mode)),
        "sentence-transformers": list(by_sentence_transformers(folder, groups)),
    }
    readings["versions"] = {
        name: importlib.metadata.version(name) for name in ("transformers", "sentence-transformers")
    }
    Path(out).write_text(json.dumps(readings), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
