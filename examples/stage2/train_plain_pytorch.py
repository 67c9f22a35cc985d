"""Stage II, contrastive training, from an `anchor export --stage2` folder: plain PyTorch and transformers, no trainer.

    python examples/stage2/train_plain_pytorch.py EXPORT pairs.jsonl --out stage2

Rows of DATA (.jsonl): `anchor`, `positive`, optionally columns that begin with `negative` (hard negatives) and
`language`. The text contract, `anchor.json` of the export, says how a text becomes tokens; it is all that has to be
right: template, instruction, the closing [EOS] kept by truncation, the embedding read at [EOS].

Legend: R rows of a step, C candidates (positives, then negatives), D hidden size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, str]


class Texts:
    """Texts to right-padded token ids, as the text contract says."""

    def __init__(self, export: Path) -> None:
        if not (export / "modules.json").is_file():  # a checkpoint's tokenizer closes no text
            raise SystemExit(f"{export}: not an export of anchor; make one: anchor export {export} --stage2")
        self.contract: dict[str, Any] = json.loads((export / "anchor.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(export)
        self.eos: int = self.contract["eos_token_id"]
        if self.contract["pooling_mode"] not in ("eos_token", "last_token"):
            raise SystemExit(f"{export}: pools by {self.contract['pooling_mode']}; here a text's last state is read")

    def ids(self, content: str, instruction: str | None) -> list[int]:
        """Ids of one templated text. The export's tokenizer closes it with [EOS], which truncation keeps."""
        text = f"{instruction}; {content}" if instruction else content
        before = self.contract["text_template"].partition("{text}")[0]
        ids: list[int] = self.tokenizer(before + text.strip(), truncation=True)["input_ids"]
        return ids

    def query(self, row: Row) -> list[int]:
        instructions = self.contract["instructions"]
        usual = instructions.get("*", next(iter(instructions.values())))
        return self.ids(row["anchor"], instructions.get(row.get("language"), usual))

    def document(self, text: str) -> list[int]:
        return self.ids(text, None)


def embed(model: torch.nn.Module, texts: list[list[int]], pad: int) -> torch.Tensor:
    """(N, D) normalised embeddings: the last hidden state at each text's last token, [EOS]."""
    lengths = torch.tensor([len(ids) for ids in texts])
    width = int(lengths.max())
    inputs = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts])
    mask = (torch.arange(width) < lengths[:, None]).long()
    device = next(model.parameters()).device
    hidden = model(input_ids=inputs.to(device), attention_mask=mask.to(device)).last_hidden_state
    return F.normalize(hidden[torch.arange(len(texts)), lengths - 1].float(), dim=-1)


def info_nce(
    queries: torch.Tensor, candidates: torch.Tensor, temperature: float, same: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE (arXiv 1807.03748): query i's candidate is i, all others are its negatives.

    Args:
        queries: (R, D) normalised.
        candidates: (C, D) normalised, C >= R; rows R … C-1 are hard negatives.
        same: (R, C) True where a candidate other than i is the same text as candidate i, and so no negative.
    """
    scores = queries @ candidates.T / temperature
    if same is not None:
        scores = scores.masked_fill(same, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def same_texts(documents: list[str], num_queries: int) -> torch.Tensor:
    """(R, C) mask of candidates that equal the row's own positive, itself excepted."""
    equal = torch.tensor([[left == right for right in documents] for left in documents[:num_queries]])
    return equal & ~torch.eye(num_queries, len(documents), dtype=torch.bool)


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl file; blank lines do not count."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows or not {"anchor", "positive"} <= set(rows[0]):
            raise ValueError("no rows with anchor and positive")
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: expected a .jsonl file of objects with anchor and positive ({error})") from error
    return rows


def batches(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, shuffled anew every pass; a last incomplete one is dropped."""
    generator = random.Random(seed)
    while True:
        order = rows[:]
        generator.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and save; returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder written by anchor export --stage2")
    parser.add_argument("data", type=Path, help=".jsonl file: anchor, positive, negative…, language")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model; must not exist")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out}: exists already")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("one process only; several GPUs: train_sentence_transformers.py under torchrun")

    rows = read_rows(args.data)
    args.batch_size = min(args.batch_size, len(rows))
    negatives = sorted(name for name in rows[0] if name.startswith("negative"))
    texts = Texts(args.export)
    language_model = AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32)
    language_model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    encoder = language_model.get_decoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.learning_rate, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    losses: list[float] = []
    for step, batch in zip(range(args.steps), batches(rows, args.batch_size, args.seed)):
        rate = min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        documents = [row["positive"] for row in batch] + [row[name] for name in negatives for row in batch]
        ids = [texts.query(row) for row in batch] + [texts.document(text) for text in documents]
        embeddings = embed(encoder, ids, texts.eos)
        same = same_texts(documents, len(batch)).to(embeddings.device)
        loss = info_nce(embeddings[: len(batch)], embeddings[len(batch) :], args.temperature, same)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}")

    # The export's files say how every stack uses the model: keep them. Weights and what was said of them are new.
    of_stage_one = ("*.safetensors*", "parity.json", "scores.json", "stage_II.json", "README.md")
    shutil.copytree(args.export, args.out, ignore=shutil.ignore_patterns(*of_stage_one))
    language_model.save_pretrained(args.out)
    contract = json.dumps(texts.contract | {"dtype": "float32"}, ensure_ascii=False, indent=2)
    (args.out / "anchor.json").write_text(contract + "\n", encoding="utf-8")
    return losses


if __name__ == "__main__":
    main()
