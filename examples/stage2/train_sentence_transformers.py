"""Stage II, contrastive training, from an `anchor export --stage2` folder with sentence-transformers' own trainer.

    pip install -c constraints.txt '.[sentence-transformers]'      # in the repository
    python examples/stage2/train_sentence_transformers.py EXPORT pairs.jsonl --out stage2

DATA is a .jsonl file or a `save_to_disk` folder with the columns `anchor` and `positive`. Columns whose names begin
with `negative` are hard negatives; a `language` column chooses each row's instruction.
The prompts (template, instruction), the closing [EOS] and the pooling come with the export, the settings with its
stage_II.json: batch size, learning rate, schedule, temperature, whatever else the trainer's arguments are named.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import fields
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


def make_loss(model: SentenceTransformer, guide: str | None, temperature: float, mini_batch_size: int) -> Any:
    """In-batch negatives; with a guide model, those that the guide finds nearer than the positive are left out.

    The guide is given the student's texts decoded: the template's words and the instruction are part of them.
    """
    if guide is None:
        return MultipleNegativesRankingLoss(model, scale=1 / temperature)
    judge = SentenceTransformer(guide, device=str(model.device))
    return CachedGISTEmbedLoss(model, judge, temperature=temperature, mini_batch_size=mini_batch_size)


def settings_of(export: Path) -> dict[str, Any]:
    """The export's stage_II.json: what the trainer takes, and `loss` and `temperature`.

    What the model itself carries (prompts, pooling, template) is not read again; any other key is refused, so that an
    edit never changes nothing.
    """
    path = export / "stage_II.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for carried in ("pooling_mode", "text_template", "instructions", "prompts", "model_name_or_path", "output_dir"):
        settings.pop(carried, None)
    settings.pop("dataset_file_path", None)
    known = {field.name for field in fields(SentenceTransformerTrainingArguments)}
    unknown = sorted(set(settings) - known - {"loss", "temperature", "max_seq_length"})
    if unknown:
        raise SystemExit(f"{path}: nothing here reads {', '.join(unknown)}")
    if not torch.cuda.is_available():
        settings["bf16"] = False
    return settings


def keep_contract(export: Path, out: Path) -> None:
    """The files of the export that sentence-transformers does not save: by them anchor knows the model as its own."""
    for name in ("anchor.json", "llm2vec_config.json", "anchor_pooling.py"):
        if (export / name).is_file():
            shutil.copyfile(export / name, out / name)
    if (export / "base_tokenizer").is_dir():
        shutil.copytree(export / "base_tokenizer", out / "base_tokenizer", dirs_exist_ok=True)
    if (out / "anchor.json").is_file():
        contract = json.loads((out / "anchor.json").read_text(encoding="utf-8"))
        (out / "anchor.json").write_text(json.dumps(contract | {"dtype": "float32"}, ensure_ascii=False, indent=2))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and save; returns the trainer's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder written by anchor export --stage2")
    parser.add_argument("data", type=Path, help=".jsonl file or save_to_disk folder: anchor, positive, negative…")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--guide", help="embedding model for CachedGISTEmbedLoss; without it: in-batch negatives")
    parser.add_argument("--mini-batch-size", type=int, default=16, help="pairs held at once by CachedGISTEmbedLoss")
    own = parser.add_argument_group("instead of the value in the export's stage_II.json")
    own.add_argument("--steps", type=int, dest="max_steps", help="optimizer steps, whatever the number of epochs")
    own.add_argument("--epochs", type=float, dest="num_train_epochs")
    own.add_argument("--batch-size", type=int, dest="per_device_train_batch_size", help="pairs a step on one GPU")
    own.add_argument("--learning-rate", type=float)
    own.add_argument("--temperature", type=float, help="divides cosines; 0.05 is a scale of 20")
    own.add_argument("--seed", type=int)
    args = parser.parse_args(arguments)

    settings = {"temperature": 0.05, "batch_sampler": "no_duplicates"} | settings_of(args.export)
    names = [action.dest for action in own._group_actions]
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    # Weights in fp32: at bf16's eight bits an update of 2e-5 rounds to nothing. `bf16` is autocast, for GPUs.
    model = SentenceTransformer(
        str(args.export),
        model_kwargs={"dtype": torch.float32},
        trust_remote_code=(args.export / "anchor_pooling.py").is_file(),  # the file anchor wrote: pooling of content
    )
    model.max_seq_length = min(model.max_seq_length, settings.pop("max_seq_length", model.max_seq_length))
    data = by_language(load_rows(args.data))
    guide, temperature = args.guide, settings.pop("temperature")
    asked = settings.pop("loss", "MultipleNegativesRankingLoss")
    if asked not in ("MultipleNegativesRankingLoss", "CachedGISTEmbedLoss"):
        parser.error(f"stage_II.json: loss {asked} is neither MultipleNegativesRankingLoss nor CachedGISTEmbedLoss")
    if asked == "CachedGISTEmbedLoss" and guide is None:
        parser.error("stage_II.json asks for CachedGISTEmbedLoss: name its --guide")
    loss = make_loss(model, guide, temperature, args.mini_batch_size)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            prompts=prompts_of(model, data),
            report_to="none",
            **settings,
        ),
        train_dataset=data,
        loss=loss,
    )
    metrics: dict[str, float] = trainer.train().metrics
    model.save_pretrained(str(args.out))
    keep_contract(args.export, args.out)
    print(f"{args.out}: trained {trainer.state.global_step} steps, mean loss {metrics['train_loss']:.4f}")
    return metrics | {
        "first_loss": trainer.state.log_history[0]["loss"],
        "last_loss": [line["loss"] for line in trainer.state.log_history if "loss" in line][-1],
    }


if __name__ == "__main__":
    main()
