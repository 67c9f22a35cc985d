"""Random Korean and English texts, fuzzed around the truncation limit, through four ways to encode an export.

Ours, sentence-transformers (batches of 1 and 32, both padding sides) and plain transformers: the same token ids, and
cosine >= 1 - 1e-6 in float32. About 150 texts here; 1,000 with the real vocabulary in the slow test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fixtures import make_checkpoint, make_contract, random_texts, texts_around_limit

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, read_contract
from anchor_cli.data.text import TextEncoder, load_tokenizer
from anchor_cli.evaluate.embedder import PackedEmbedder, load_embedder
from anchor_cli.export import export as exporting
from anchor_cli.export.export import export

KINDS = (("document", None), ("query_ko", INSTRUCTION_KO), ("query_en", INSTRUCTION_EN))
HEAD = "<|im_start|>user\n"


def export_of(model: Path, folder: Path, max_seq_length: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export without its own certificate: this is the independent one."""
    checks = [{"against": "nothing", "lowest_cosine": 1.0}]
    parity = {"passed": True, "num_texts": 0, "not_checked": [], "checks": checks}
    monkeypatch.setattr(exporting, "certify", lambda *_, **__: parity)
    checkpoint = make_checkpoint(folder, 1, model, make_contract(model, max_seq_length=max_seq_length))
    return export(checkpoint, out=folder / "export").folder


def some_texts(folder: Path, instruction: str | None, num: int) -> list[str]:
    """Half of them within a few tokens of the limit."""
    contract = read_contract(folder)
    encoder = TextEncoder(load_tokenizer(folder), contract.text_template, contract.max_seq_length)

    def count(text: str) -> int:
        return encoder.encode_batch([text], instruction)[0].num_tokens

    seed = sum(map(ord, instruction or ""))
    return texts_around_limit(count, contract.max_seq_length, num // 2, seed) + random_texts(num - num // 2, seed + 1)


def lowest_cosine(ours: Any, theirs: Any) -> float:
    a, b = (np.asarray(each, dtype=np.float64) for each in (ours, theirs))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def check_parity(folder: Path, num_texts: int) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    contract = read_contract(folder)
    encoder = TextEncoder(load_tokenizer(folder), contract.text_template, contract.max_seq_length)
    ours = load_embedder(folder, device="cpu", dtype="float32")
    assert isinstance(ours, PackedEmbedder)
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32)
    for name, instruction in KINDS:
        texts = some_texts(folder, instruction, num_texts // len(KINDS))
        encoded = encoder.encode_batch(texts, instruction)
        assert 0 < sum(len(text.ids) < text.num_tokens for text in encoded) < len(texts), "some are truncated"
        vectors = ours.encode(texts, instruction)
        prompt = HEAD + (f"{instruction}; " if instruction else "")
        for side in ("left", "right"):
            theirs.tokenizer.padding_side = side
            batch = theirs.preprocess(texts, prompt=prompt)
            for text, ids, mask in zip(encoded, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                assert ids[mask].tolist() == text.ids.tolist()
            by_library = theirs.encode(texts, prompt_name=name, batch_size=32)
            assert lowest_cosine(vectors, by_library) >= 1 - 1e-6, (name, side)
            by_hand = []
            for begin in range(0, len(texts), 32):
                some = [prompt + text for text in texts[begin : begin + 32]]
                padded = tokenizer(some, padding=True, padding_side=side, truncation=True, return_tensors="pt")
                with torch.no_grad():
                    states = model(**padded).last_hidden_state
                for row, mask, text in zip(states, padded["attention_mask"].bool(), encoded[begin:], strict=False):
                    assert int(mask.sum()) == len(text.ids)
                    by_hand.append(row[mask][-1].numpy())
            assert lowest_cosine(vectors, by_hand) >= 1 - 1e-6, (name, side)
        by_one = theirs.encode(texts, prompt_name=name, batch_size=1)
        assert lowest_cosine(vectors, by_one) >= 1 - 1e-6, name


def test_150_texts(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parity(export_of(small_model, tmp_path, 64, monkeypatch), 150)


@pytest.mark.slow
def test_1000_texts_with_the_real_vocabulary(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parity(export_of(tiny_model, tmp_path, 128, monkeypatch), 1000)
