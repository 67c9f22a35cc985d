"""Stage II, contrastive training, from an `anchor export --stage2` folder with sentence-transformers' own trainer.

    pip install -c constraints.txt '.[sentence-transformers]'      # in the repository
    python examples/stage2/train_sentence_transformers.py EXPORT pairs.jsonl --out stage2 --eval ko:beir/my-set
    torchrun --nproc-per-node 2 examples/stage2/train_sentence_transformers.py EXPORT mined --out kure --recipe kure
    torchrun --nproc-per-node 2 examples/stage2/train_sentence_transformers.py EXPORT pairs.jsonl --out stage2

DATA is a .jsonl, .json, .csv or .parquet file or a `save_to_disk` folder (`anchor mine` writes one) with the columns
`anchor` and `positive`. Columns whose names begin with `negative` are hard negatives, also a list column `negatives`;
a `language` column chooses each row's instruction.
The prompts (template, instruction), the closing [EOS] and the pooling come with the export, the settings with its
stage_II.json: batch size, learning rate, schedule, temperature, whatever else the trainer's arguments are named.
`--recipe NAME` takes those of its `recipes` over the simple ones.
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
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch.nn import functional as F

LOSSES = ("MultipleNegativesRankingLoss", "CachedGISTEmbedLoss", "SelfGuidedLoss")


class SelfGuidedLoss(CachedMultipleNegativesRankingLoss):
    """Queries against all documents of the batch; the model itself says which candidates to drop and to harden.

        z = s / temperature + hardness_strength * s * [hardened]     s the cosine; no gradient through the second one
        dropped, but never the row's positive p:  s > s_p - margin (absolute)  or  s > s_p * (1 - margin) (relative)
        loss = mean over rows of [ log sum of exp z over the kept - z_p ]

    The library's guided loss has neither hardness nor the model as its own guide, and its loss with hardness no guide.
    `anchor train` computes the same (docs/contrastive.md), and besides drops every known positive's text, where here
    the sampler keeps duplicates out of a batch. Cosines are float32 under autocast, too: at 0.01 bf16 is too coarse.

    Args:
        margin_strategy: `absolute`, `relative`, or None: nothing is dropped.
        hardness_mode: `hard_negatives` (the row's own), `explicit_negatives` (every row's), `in_batch_negatives` (all
            documents of other rows), `all_negatives`, or None.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float,
        mini_batch_size: int = 16,
        margin_strategy: str | None = None,
        margin: float = 0.0,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(model, scale=1 / temperature, mini_batch_size=mini_batch_size)
        if margin_strategy not in (None, "absolute", "relative"):
            raise SystemExit(f"margin_strategy {margin_strategy}: expected absolute or relative")
        modes = (None, "hard_negatives", "explicit_negatives", "in_batch_negatives", "all_negatives")
        if hardness_mode not in modes:
            raise SystemExit(f"hardness_mode {hardness_mode}: expected one of {', '.join(filter(None, modes))}")
        self.margin_strategy, self.margin = margin_strategy, margin
        self.hardened, self.strength = hardness_mode, hardness_strength

    def calculate_loss(
        self, reps: list[list[torch.Tensor]], labels: torch.Tensor | None = None, *, with_backward: bool = False
    ) -> torch.Tensor:
        """The loss of G rows from mini-batches of embeddings of queries, positives, first negatives, …"""
        with torch.autocast(reps[0][0].device.type, enabled=False):
            queries, *documents = (_unit_rows(torch.cat(side)) for side in reps)
            num_rows, candidates = len(queries), torch.cat(documents)  # column k * G + i: document k of row i
            losses = []
            for rows in torch.arange(num_rows, device=queries.device).split(self.mini_batch_size):
                s = queries[rows] @ candidates.T
                loss = F.cross_entropy(self._logits(s, rows, num_rows), rows, reduction="sum") / num_rows
                if with_backward:
                    loss.backward(retain_graph=bool(rows[-1] < num_rows - 1))
                    loss = loss.detach()
                losses.append(loss)
        return torch.stack(losses).sum()

    def _logits(self, s: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        """(B, C) z of the cosines s; what is dropped is -inf."""
        column, row = torch.arange(s.shape[1], device=s.device)[None], rows[:, None]
        positive, own, explicit = column == row, column % num_rows == row, column >= num_rows
        hardened = {
            "hard_negatives": own & explicit,
            "explicit_negatives": explicit.expand_as(own),
            "in_batch_negatives": ~own,
            "all_negatives": ~positive,
        }
        guide = s.detach()
        z = s * self.scale
        if self.hardened is not None:
            z = z + self.strength * guide * hardened[self.hardened]
        if self.margin_strategy is not None:
            threshold = guide.gather(1, row)
            threshold = threshold - self.margin if self.margin_strategy == "absolute" else threshold * (1 - self.margin)
            z = z.masked_fill((guide > threshold) & ~positive, -torch.inf)
        return z

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "mini_batch_size": self.mini_batch_size,
            "margin_strategy": self.margin_strategy,
            "margin": self.margin,
            "hardness_mode": self.hardened,
            "hardness_strength": self.strength,
        }


def _unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def load_rows(path: Path, num_negatives: int) -> Dataset:
    """All rows of DATA with the columns that the loss reads, in the loss's order: anchor, positive, negatives."""
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if not path.exists():
        raise SystemExit(f"{path}: not found")
    if path.is_file() and path.suffix not in readers:
        raise SystemExit(f"{path}: expected {', '.join(readers)} or a save_to_disk folder")
    try:
        if path.is_dir():
            rows = load_from_disk(str(path))
        else:
            rows = load_dataset(readers[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the libraries raise their own kinds
        raise SystemExit(f"{path}: could not be read: {str(error).splitlines()[0]}") from error
    if missing := {"anchor", "positive"} - set(rows.column_names):
        raise SystemExit(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}")
    if "negatives" in rows.column_names:
        rows = spread_negatives(rows, num_negatives)
    is_text = {name for name in rows.column_names if _is_text(rows, name)}
    negatives = sorted(name for name in rows.column_names if name.startswith("negative") and name in is_text)
    language = ["language"] if "language" in rows.column_names else []
    return rows.select_columns(["anchor", "positive", *negatives, *language])


def _is_text(rows: Dataset, name: str) -> bool:
    return getattr(rows.features[name], "dtype", None) in ("string", "large_string")


def spread_negatives(rows: Dataset, num_negatives: int) -> Dataset:
    """The list column `negatives` as columns negative_1 … negative_K: the best first, of few the first again.

    The loss needs as many of every row, so rows without any are left out.
    """
    some = rows.filter(lambda row: len(row["negatives"] or []) > 0)
    if len(some) < len(rows):
        print(f"{len(rows) - len(some)} of {len(rows)} rows have no negatives and are left out")
    most = min(num_negatives, max(len(row) for row in some["negatives"])) if len(some) else 0

    def columns(row: dict[str, Any]) -> dict[str, str]:
        given = row["negatives"]
        return {f"negative_{place + 1}": given[place % len(given)] for place in range(most)}

    return some.map(columns, remove_columns=["negatives"])


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


def make_loss(
    model: SentenceTransformer,
    name: str,
    guide: str | None,
    start: Path,
    temperature: float,
    mini_batch_size: int,
    options: dict[str, Any],
) -> Any:
    """In-batch negatives; with a guide model, those that the guide finds nearer than the positive are left out.

    Without `guide` the guide of CachedGISTEmbedLoss is the export itself, as it is before training. It is given the
    student's texts decoded: the template's words and the instruction are part of them. `options`: of SelfGuidedLoss.
    """
    if name == "MultipleNegativesRankingLoss":
        return MultipleNegativesRankingLoss(model, scale=1 / temperature)
    if name == "SelfGuidedLoss":
        return SelfGuidedLoss(model, temperature=temperature, mini_batch_size=mini_batch_size, **options)
    judge = SentenceTransformer(guide, device=str(model.device)) if guide else load_export(start)
    return CachedGISTEmbedLoss(model, judge, temperature=temperature, mini_batch_size=mini_batch_size)


def load_export(folder: Path) -> SentenceTransformer:
    """The export with fp32 weights: at bf16's eight bits an update of 2e-5 rounds to nothing. `bf16` is autocast."""
    if not (folder / "modules.json").is_file() or not (folder / "anchor.json").is_file():
        hint = f"make one: anchor export {folder} --stage2" if (folder / "config.json").is_file() else "not found"
        raise SystemExit(f"{folder}: not an export of anchor (no modules.json with prompts, pooling and [EOS]); {hint}")
    return SentenceTransformer(
        str(folder),
        model_kwargs={"dtype": torch.float32},
        trust_remote_code=(folder / "anchor_pooling.py").is_file(),  # the file anchor wrote: pooling of content
    )


def make_evaluator(places: list[str], model: SentenceTransformer) -> SequentialEvaluator | None:
    """nDCG@10 and the like on BEIR folders (corpus.jsonl, queries.jsonl, qrels/test.tsv), each [LANG:]DIR."""
    evaluators: list[Any] = []
    for place in places:
        language, _, folder = place.rpartition(":")
        path = Path(folder)
        try:
            corpus = {row["_id"]: row for row in read_jsonl(path / "corpus.jsonl")}
            queries = {row["_id"]: row["text"] for row in read_jsonl(path / "queries.jsonl")}
            lines = (path / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"--eval {place}: not a BEIR folder ({error})") from error
        relevant: dict[str, set[str]] = {}
        for query, document, grade in (line.split("\t") for line in lines if line.strip()):
            if int(grade) > 0:
                relevant.setdefault(query, set()).add(document)
        evaluators.append(
            InformationRetrievalEvaluator(
                {key: text for key, text in queries.items() if key in relevant},
                {key: f"{row.get('title') or ''} {row['text']}".strip() for key, row in corpus.items()},
                relevant,
                name=path.name,
                query_prompt=model.prompts.get(f"query_{language}", model.prompts["query"]),
                corpus_prompt=model.prompts["document"],
                write_csv=False,
            )
        )
    return SequentialEvaluator(evaluators) if evaluators else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


OF_THE_LOSS = ("margin_strategy", "margin", "hardness_mode", "hardness_strength")
OF_THIS_SCRIPT = ("loss", "temperature", "max_seq_length", "mini_batch_size", "num_hard_negatives", *OF_THE_LOSS)


def settings_of(export: Path, recipe: str | None = None) -> dict[str, Any]:
    """The export's stage_II.json: what the trainer takes, and what this script does; a recipe's values over them.

    What the model itself carries (prompts, pooling, template) is not read again; any other key is refused, so that an
    edit never changes nothing.
    """
    path = export / "stage_II.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for carried in ("pooling_mode", "text_template", "instructions", "prompts", "model_name_or_path", "output_dir"):
        settings.pop(carried, None)
    settings.pop("dataset_file_path", None)
    recipes = settings.pop("recipes", {})
    if recipe is not None and recipe not in recipes:
        raise SystemExit(f"{path}: no recipe {recipe}; it has {', '.join(recipes) or 'none'}")
    settings |= recipes.get(recipe, {})
    known = {field.name for field in fields(SentenceTransformerTrainingArguments)}
    unknown = sorted(set(settings) - known - set(OF_THIS_SCRIPT))
    if unknown:
        raise SystemExit(f"{path}: nothing here reads {', '.join(unknown)}")
    if not torch.cuda.is_available():
        settings |= {"bf16": False, "use_cpu": True}  # without use_cpu the ranks of torchrun would train apart
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


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the trainer's settings: the export's stage_II.json with the options instead of its values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder written by anchor export --stage2")
    parser.add_argument("data", type=Path, help="file or save_to_disk folder: anchor, positive, negative…")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--guide", help="embedding model for CachedGISTEmbedLoss; default there: the export itself")
    parser.add_argument("--recipe", metavar="NAME", help="of stage_II.json's recipes, over its simple values: kure")
    parser.add_argument("--loss", choices=LOSSES, help="default: stage_II.json's, or by --guide")
    parser.add_argument(
        "--eval", action="append", default=[], metavar="[LANG:]DIR", help="BEIR folder; may be repeated"
    )
    own = parser.add_argument_group("instead of the value in the export's stage_II.json")
    own.add_argument("--steps", type=int, dest="max_steps", help="optimizer steps, whatever the number of epochs")
    own.add_argument("--epochs", type=float, dest="num_train_epochs")
    own.add_argument("--batch-size", type=int, dest="per_device_train_batch_size", help="pairs a step on one GPU")
    own.add_argument("--learning-rate", type=float)
    own.add_argument("--temperature", type=float, help="divides cosines; 0.05 is a scale of 20")
    own.add_argument("--mini-batch-size", type=int, help="texts encoded at once by the two cached losses [16]")
    own.add_argument(
        "--num-negatives", type=int, dest="num_hard_negatives", help="of a list column `negatives`, at most so many [4]"
    )
    own.add_argument("--seed", type=int)
    own.add_argument("--report-to", help="wandb, tensorboard, … or none")
    args = parser.parse_args(arguments)
    usual = {"temperature": 0.05, "batch_sampler": "no_duplicates", "report_to": "none"}
    settings = usual | {"mini_batch_size": 16, "num_hard_negatives": 4} | settings_of(args.export, args.recipe)
    names = [action.dest for action in own._group_actions]
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    asked = settings.pop("loss", LOSSES[0])
    args.loss = args.loss or (LOSSES[1] if args.guide else asked)
    if args.loss not in LOSSES:
        parser.error(f"stage_II.json: loss {args.loss} is none of {', '.join(LOSSES)}")
    if args.eval:
        settings = {"eval_strategy": "steps", "eval_steps": settings.get("save_steps", 500)} | settings
    return args, settings


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and save; returns the trainer's metrics. Under torchrun rank 0 alone writes the model."""
    args, settings = parse(arguments)
    model = load_export(args.export)
    model.max_seq_length = min(model.max_seq_length, settings.pop("max_seq_length", model.max_seq_length))
    data = by_language(load_rows(args.data, settings.pop("num_hard_negatives")))
    options = {name: settings.pop(name) for name in OF_THE_LOSS if name in settings}
    temperature, mini_batch_size = settings.pop("temperature"), settings.pop("mini_batch_size")
    loss = make_loss(model, args.loss, args.guide, args.export, temperature, mini_batch_size, options)
    evaluator = make_evaluator(args.eval, model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(args.out / "checkpoints"), prompts=prompts_of(model, data), **settings
        ),
        train_dataset=data,
        loss=loss,
        evaluator=evaluator,
    )
    metrics: dict[str, float] = trainer.train().metrics
    if trainer.is_world_process_zero():
        if evaluator is not None:
            metrics |= {name: float(value) for name, value in evaluator(model).items() if name.endswith("ndcg@10")}
        model.save_pretrained(str(args.out))
        keep_contract(args.export, args.out)
        print(f"{args.out}: trained {trainer.state.global_step} steps, mean loss {metrics['train_loss']:.4f}")
    trainer.accelerator.wait_for_everyone()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]  # none before logging_steps
    return metrics | ({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})


if __name__ == "__main__":
    main()
