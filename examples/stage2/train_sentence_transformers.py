"""Stage II, contrastive training, from an `anchor export --stage2` folder with sentence-transformers' own trainer.

    pip install 'anchor-cli[sentence-transformers]' accelerate
    python examples/stage2/train_sentence_transformers.py EXPORT pairs.jsonl --out stage2

DATA is a .jsonl file or a `save_to_disk` folder with the columns `anchor` and `positive`. Columns whose names begin
with `negative` are hard negatives; a `language` column chooses each row's instruction.
The prompts (template, instruction), the closing [EOS] and the pooling come with the export: nothing is set here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers


def load_rows(path: Path) -> Dataset:
    """All rows of DATA with the columns that the loss reads, in the loss's order: anchor, positive, negatives."""
    rows = load_from_disk(str(path)) if path.is_dir() else load_dataset("json", data_files=str(path), split="train")
    if missing := {"anchor", "positive"} - set(rows.column_names):
        raise SystemExit(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}")
    negatives = sorted(name for name in rows.column_names if name.startswith("negative"))
    language = ["language"] if "language" in rows.column_names else []
    return rows.select_columns(["anchor", "positive", *negatives, *language])


def by_language(rows: Dataset) -> DatasetDict:
    """One data set per language, because a prompt belongs to a column of a data set; batches are of one language."""
    if "language" not in rows.column_names:
        return DatasetDict({"all": rows})
    languages = rows.unique("language")
    return DatasetDict(
        {
            language: rows.filter(lambda row, wanted=language: row["language"] == wanted).remove_columns("language")
            for language in languages
        }
    )


def prompts_of(model: SentenceTransformer, data: DatasetDict) -> dict[str, dict[str, str]]:
    """The export's prompt of every column: the instruction for queries, the bare template for documents."""
    document = model.prompts["document"]
    return {
        language: {
            name: model.prompts.get(f"query_{language}", model.prompts["query"]) if name == "anchor" else document
            for name in rows.column_names
        }
        for language, rows in data.items()
    }


def make_loss(model: SentenceTransformer, args: argparse.Namespace) -> Any:
    """In-batch negatives; with a guide model, those that the guide finds nearer than the positive are left out."""
    if args.guide is None:
        return MultipleNegativesRankingLoss(model, scale=1 / args.temperature)
    guide = SentenceTransformer(args.guide, device=str(model.device))
    return CachedGISTEmbedLoss(model, guide, temperature=args.temperature, mini_batch_size=args.mini_batch_size)


def defaults_of(export: str) -> dict[str, Any]:
    """Options that the export's stage_II.json sets; what is said on the command line goes before it."""
    path = Path(export) / "stage_II.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
    named = {name: config[keys.get(name, name)] for name in [*keys, "learning_rate", "temperature", "seed"]}
    return named | {"bf16": config["bf16"] and torch.cuda.is_available()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and save; returns the trainer's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder written by anchor export --stage2")
    parser.add_argument("data", type=Path, help=".jsonl file or save_to_disk folder: anchor, positive, negative…")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--guide", help="embedding model for CachedGISTEmbedLoss; without it: in-batch negatives")
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps; default: --epochs")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a step on one GPU: the in-batch negatives")
    parser.add_argument("--mini-batch-size", type=int, default=16, help="pairs held at once by CachedGISTEmbedLoss")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--temperature", type=float, default=0.05, help="divides cosines; 0.05 is a scale of 20")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for GPUs")
    parser.add_argument("--seed", type=int, default=42)
    parser.set_defaults(**defaults_of(parser.parse_known_args(arguments)[0].export))
    args = parser.parse_args(arguments)

    model = SentenceTransformer(args.export)
    data = by_language(load_rows(args.data))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            max_steps=args.steps,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            bf16=args.bf16,
            seed=args.seed,
            prompts=prompts_of(model, data),
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # an equal document in the batch would be a false negative
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        loss=make_loss(model, args),
    )
    metrics: dict[str, float] = trainer.train().metrics
    model.save_pretrained(str(args.out))
    print(f"{args.out}: trained {trainer.state.global_step} steps, mean loss {metrics['train_loss']:.4f}")
    return metrics | {
        "first_loss": trainer.state.log_history[0]["loss"],
        "last_loss": [line["loss"] for line in trainer.state.log_history if "loss" in line][-1],
    }


if __name__ == "__main__":
    main()
