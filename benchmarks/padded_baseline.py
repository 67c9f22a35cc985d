"""The peer: Stage I training the way it is done today, with padded batches. Shares no code with `anchor_cli`.

    python benchmarks/padded_baseline.py MODEL_FOLDER ROWS [--rows 8] [--steps 3] [--max-seq-length 512]

A stock transformers model; the collator tokenises text and finds the content mask by text; queries and documents are
one left-padded rectangle each (to the longest text of the batch); four passes a step (encode query, encode document,
reconstruct query, reconstruct document); logits of every position in float32; cross-entropy with ignored positions;
gradient checkpointing on; AdamW (fused), clipping at 1.0.

It is kept lean, so that the comparison is fair: [EOS] survives truncation, the anchor embedding stands directly before
the text, no column is wasted (reconstruction runs over L - 1 of L columns), the encoding passes compute no logits,
flash attention unpads where it is asked for. So it optimises exactly the objective of anchor, and its loss must be
equal.

Legend: B rows, L columns of a side, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SEPARATOR = "!@#$%^&*()"
INSTRUCTION = "주어진 질문에 대해 관련 문서를 검색하세요"
TEMPLATE = "<|im_start|>user\n{text}<|im_end|>"
EOS_ID = 151645
IGNORE = -100

Row = tuple[str, str]  # query, document


@dataclass
class Side:
    """One side of a padded batch; `content` marks the tokens of the query/document itself (pooling modes need it)."""

    input_ids: torch.Tensor  # (B, L) int64, padded on the left with [EOS]
    attention_mask: torch.Tensor  # (B, L) int64
    content: torch.Tensor  # (B, L) bool


class Collator:
    """Rows of text to two padded sides, on the fly, as the data loader of the research code does."""

    def __init__(self, tokenizer: Any, max_seq_length: int) -> None:
        self.tokenizer, self.max_seq_length = tokenizer, max_seq_length
        tokenizer.padding_side, tokenizer.pad_token_id = "left", EOS_ID

    def _side(self, records: list[str]) -> Side:
        parts = [record.split(SEPARATOR, 1) for record in records]
        texts = [TEMPLATE.format(text=(before + content).strip()) for before, content in parts]
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ids[:, -1] = EOS_ID  # a truncated text keeps its [EOS]
        tails = self.tokenizer([c.strip() + "<|im_end|>" for _, c in parts], add_special_tokens=False)["input_ids"]
        content = torch.zeros_like(mask, dtype=torch.bool)
        for row, tail in enumerate(tails):
            content[row, -min(len(tail), int(mask[row].sum())) : -1] = True
        return Side(ids, mask, content)

    def __call__(self, rows: Sequence[Row]) -> tuple[Side, Side]:
        queries = [f"{INSTRUCTION}; {SEPARATOR}{query}" for query, _ in rows]
        return self._side(queries), self._side([f"{SEPARATOR}{document}" for _, document in rows])


def encode(model: Any, side: Side) -> torch.Tensor:
    """The last hidden state of [EOS]: (B, D)."""
    positions = (side.attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.model(
        input_ids=side.input_ids, attention_mask=side.attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden[:, -1]


def reconstruct(model: Any, embedding: torch.Tensor, side: Side) -> torch.Tensor:
    """Cross-entropy of the texts of `side` given the other side's `embedding` (B, D): a scalar."""
    mask = side.attention_mask[:, :-1]  # columns e, t_1 .. t_{n-2}: one fewer than the text has
    labels = side.input_ids[:, :-1].masked_fill(mask == 0, IGNORE)
    labels = labels.masked_fill(labels == EOS_ID, IGNORE)
    before = F.pad(side.input_ids[:, :-2], (1, 0), value=EOS_ID)
    inputs = model.get_input_embeddings()(before)
    first = mask.argmax(1)  # the column right before t_1 moved by one: where e stands
    rows = torch.arange(len(first), device=first.device)
    inputs = inputs.index_put((rows, first), embedding.to(inputs.dtype))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


class PaddedTrainer:
    """Model, collator and optimizer; `step` is one optimizer update on one padded batch."""

    def __init__(
        self,
        model_folder: str | Path,
        *,
        max_seq_length: int = 512,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = True,
        learning_rate: float = 4e-5,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=dtype, attn_implementation=attn_implementation
        ).to(device)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.collate = Collator(AutoTokenizer.from_pretrained(model_folder), max_seq_length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)

    def losses(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """D2Q and Q2D losses of one padded batch."""
        query, document = (
            Side(*(t.to(self.device) for t in (s.input_ids, s.attention_mask, s.content))) for s in self.collate(rows)
        )
        query_embedding, document_embedding = encode(self.model, query), encode(self.model, document)
        return reconstruct(self.model, document_embedding, query), reconstruct(self.model, query_embedding, document)

    def step(self, rows: Sequence[Row]) -> float:
        d2q, q2d = self.losses(rows)
        loss = 0.8 * d2q + 0.2 * q2d
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def read_rows(path: str | Path) -> list[Row]:
    """Pairs of a `save_to_disk` folder (anchor, positive) or of a JSON-lines file (query, document)."""
    if Path(path).is_dir():
        from datasets import load_from_disk

        data = load_from_disk(str(path))
        return list(zip(data["anchor"], data["positive"], strict=True))
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [(row["query"], row["document"]) for row in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attn", default="sdpa")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    trainer = PaddedTrainer(
        args.model, max_seq_length=args.max_seq_length, device=args.device, dtype=dtype, attn_implementation=args.attn
    )
    rows = read_rows(args.data)
    for step in range(args.steps):
        start = time.perf_counter()
        loss = trainer.step(rows[step * args.rows : (step + 1) * args.rows])
        seconds = time.perf_counter() - start
        print(f"step {step + 1}  loss {loss:.4f}  {args.rows / seconds:.2f} pairs/s", flush=True)


if __name__ == "__main__":
    main()
