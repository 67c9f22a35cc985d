"""Encoding throughput: anchor's packed embedder against sentence-transformers, same model, same texts, taking turns.

    python benchmarks/encode_throughput.py [--model FOLDER] [--beir ../shared/data/beir/welfare-ko] [--texts 300]

Both get the same model folder in the same precision and are timed from text to vectors, tokenisation included; both
sort by length. sentence-transformers pads its batches of 32 (its default) and takes the last token; its texts carry the
template already, so the token ids are the same, and the vectors of texts that neither side truncates must agree.

Length mixes: real documents and queries, equal short texts, equal long texts, one long among many short, uniform.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from train_throughput import SHARED, machine, make_model  # noqa: E402

from anchor_cli.evaluate.embedder import load_embedder  # noqa: E402

TEMPLATE = "<|im_start|>user\n{text}<|im_end|>"


def read_texts(file: Path) -> list[str]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [f"{row.get('title', '')} {row['text']}".strip() for row in rows]


def mixes(beir: Sequence[Path], count: int, seed: int) -> dict[str, list[str]]:
    """Texts by mix; the synthetic ones are cut from the real documents' words."""
    chance = np.random.default_rng(seed)
    found: dict[str, list[str]] = {}
    words: list[str] = []
    for folder in beir:
        for kind, name in (("documents", "corpus.jsonl"), ("queries", "queries.jsonl")):
            texts = read_texts(folder / name)
            chosen = [texts[i] for i in chance.permutation(len(texts))[:count]]
            found[f"{folder.name} {kind}"] = chosen
            words += " ".join(chosen).split()

    def made(lengths: Sequence[int]) -> list[str]:
        starts = chance.integers(0, max(1, len(words) - max(lengths)), size=len(lengths))
        return [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]

    found["equal short (4 words)"] = made([4] * count)
    found["equal long (150 words)"] = made([150] * max(1, count // 4))
    found["one long in twenty"] = made([150 if i % 20 == 0 else 5 for i in range(count)])
    found["uniform 1 to 150 words"] = made(chance.integers(1, 150, size=count // 2).tolist())
    found["one text"] = made([12])
    return found


def library_model(folder: Path, max_seq_length: int, device: str, dtype: torch.dtype) -> Any:
    """sentence-transformers over the plain model folder: last-token pooling, no normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=max_seq_length, model_kwargs={"dtype": dtype})
    transformer.tokenizer.pad_token = "<|endoftext|>"
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Any, theirs: Any, texts: list[str], repeats: int, device: str) -> dict[str, float]:
    """Median texts/s of both and their ratio; the first round is a warm-up. Ratio above 1: anchor is faster."""
    full = [TEMPLATE.format(text=text.strip()) for text in texts]
    seconds: dict[str, list[float]] = {"anchor": [], "sentence-transformers": []}
    for repeat in range(repeats + 1):
        turns: list[tuple[str, Callable[[], Any]]] = [
            ("anchor", lambda: ours.encode(texts, None)),
            ("sentence-transformers", lambda: theirs.encode(full, show_progress_bar=False)),
        ]
        for side, work in turns if repeat % 2 else turns[::-1]:
            value = timed(work, device)
            if repeat:
                seconds[side].append(value)
    pairs = zip(seconds["sentence-transformers"], seconds["anchor"], strict=True)
    return {
        "texts": len(texts),
        **{f"{side} texts/s": len(texts) / statistics.median(values) for side, values in seconds.items()},
        "ratio": statistics.median(theirs_s / ours_s for theirs_s, ours_s in pairs),
    }


def largest_difference(ours: Any, theirs: Any, texts: list[str]) -> float:
    """Largest 1 - cosine between the two sides' vectors of these (short) texts."""
    a = ours.encode(texts, None)
    b = np.asarray(theirs.encode([TEMPLATE.format(text=t.strip()) for t in texts], show_progress_bar=False), np.float32)
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float((1 - cosine).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: random weights in --hidden/--layers")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--full-size", action="store_true", help="random weights in the shape of Qwen3-0.6B")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "data/tokenizer")
    parser.add_argument("--beir", type=Path, action="append", help="BEIR folders; default: both of ../shared")
    parser.add_argument("--texts", type=int, default=200, help="texts of each mix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    beir = args.beir or [SHARED / "data/beir/welfare-ko", SHARED / "data/beir/vaswani"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or make_model(Path(scratch), args.tokenizer, args.hidden, args.layers, args.full_size, dtype)
        ours: Any = load_embedder(model, batch_tokens=args.batch_tokens, device=device)
        theirs = library_model(model, 512, device, dtype)
        texts = mixes(beir, args.texts, args.seed)
        about = {**machine(), "command": " ".join(["python", "benchmarks/encode_throughput.py", *sys.argv[1:]])}
        print(json.dumps(about))
        short = next(iter(texts.values()))[:8]
        apart = largest_difference(ours, theirs, [text[:200] for text in short])
        print(f"largest 1 - cosine between the two sides: {apart:.1e}")
        reports = {}
        for name, mix in texts.items():
            found = reports[name] = compare(ours, theirs, mix, args.repeats, device)
            print(f"{name:28s} {found['texts']:5.0f} texts   anchor {found['anchor texts/s']:8.1f}/s   "
                  f"sentence-transformers {found['sentence-transformers texts/s']:8.1f}/s   "
                  f"ratio {found['ratio']:.2f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "mixes": reports}, indent=2) + "\n")


if __name__ == "__main__":
    main()
