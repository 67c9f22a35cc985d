"""The whole path on a laptop CPU: make a world, prepare it, train on it, evaluate before and after, export.

On request with Stage II: hard negatives are mined with the checkpoint of Stage I, which then trains contrastively.
Nothing here is special to the demo but its data and its small model: training is `anchor train` itself, and the other
steps are the code that the command of the same name runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anchor_cli.base.console import say
from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.base.errors import InputError, RunError, Stopped
from anchor_cli.base.files import write_json
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.demo.tokenizer import train_small_tokenizer, write_small_tokenizer
from anchor_cli.demo.world import make_world, vocabulary, write_world
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.evaluate.evaluate import evaluate
from anchor_cli.export.export import export as export_checkpoint
from anchor_cli.mine.run import Mining, finish, mine_rank
from anchor_cli.mine.select import Rules
from anchor_cli.spec.spec import RunSpec

MARKER = "demo.json"  # a folder that holds it was made by a demo and may be made again
INSTRUCTIONS = {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}
NUM_NEGATIVES = 4  # of a row of Stage II at most
METRICS = ("ndcg@10", "mrr@10")


@dataclass(frozen=True)
class Recipe:
    """Size and length of a demo. The defaults are measured: see docs/demo.md."""

    seed: int = 0
    num_documents: int = 400
    steps: int = 700
    pairs_per_step: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    max_seq_length: int = 64
    hidden_size: int = 128
    num_layers: int = 3
    intermediate_size: int = 256
    initializer_range: float = 0.1

    @property
    def stage_two_steps(self) -> int:
        """60 for the 700 of Stage I, and in proportion."""
        return max(1, round(self.steps * 60 / 700))


@dataclass(frozen=True)
class StageTwo:
    """What Stage II of a demo did."""

    checkpoint: Path
    after: dict[str, Any]
    rows: int
    negatives: int


@dataclass
class Outcome:
    """What a demo did; `as_dict` is what `--json` prints and `demo.json` keeps."""

    recipe: Recipe
    folder: Path
    checkpoint: Path
    benchmarks: list[str]
    before: dict[str, Any]
    after: dict[str, Any]
    export: Path | None = None
    stage_two: StageTwo | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Expected nDCG@10 of a random order with one right document among N: 1 / (N log2(1 + rank)) over ten ranks."""
        from math import log2

        return sum(1 / log2(1 + rank) for rank in range(1, 11)) / self.recipe.num_documents

    def as_dict(self) -> dict[str, Any]:
        stage_two = asdict(self.stage_two) | {"checkpoint": str(self.stage_two.checkpoint)} if self.stage_two else None
        return {
            "recipe": asdict(self.recipe),
            "folder": str(self.folder),
            "checkpoint": str(self.checkpoint),
            "export": str(self.export) if self.export else None,
            "chance": {"ndcg@10": self.chance},
            "before": self.before,
            "after": self.after,
            **({"stage2": stage_two} if stage_two else {}),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def run_demo(folder: Path, recipe: Recipe, *, stage_two: bool = False, export: bool = True) -> Outcome:
    """Run the demo in `folder`: world/, model/, prepared/, spec.json, run/; mined/, stage2.json, stage2/; export/.

    Raises:
        InputError: the folder holds something that is not an earlier demo.
    """
    _clear(folder)
    seconds: dict[str, float] = {}
    with _timed(seconds, "world", "making a world of facts, a tokenizer and a small random Qwen3"):
        train_file, beir_folders = make_inputs(folder, recipe)
    with _timed(seconds, "prepare", "preparing the training pairs"):
        prepare_pairs(folder, train_file, recipe.max_seq_length)
    spec = write_spec(folder / "spec.json", stage_one_keys(folder, recipe, beir_folders))
    with _timed(seconds, "evaluate_before", "evaluating the untrained model on held-out questions"):
        before = measure(folder / "model", beir_folders)
    with _timed(seconds, "train", f"training {recipe.steps} steps of {recipe.pairs_per_step} pairs"):
        train(folder / "spec.json")
    checkpoint = spec.run_folder / f"checkpoint-{recipe.steps}"
    with _timed(seconds, "evaluate_after", "evaluating the trained model on the same questions"):
        after = measure(checkpoint, beir_folders)
    outcome = Outcome(recipe, folder, checkpoint, [str(path) for path in beir_folders], before, after, seconds=seconds)
    if stage_two:
        outcome.stage_two = run_stage_two(outcome, beir_folders)
    if export:
        last = outcome.stage_two.checkpoint if outcome.stage_two else checkpoint
        with _timed(seconds, "export", "exporting Stage II" if stage_two else "exporting for Stage II"):
            outcome.export = export_checkpoint(last, out=folder / "export").folder
    write_json(folder / MARKER, outcome.as_dict())
    return outcome


def run_stage_two(outcome: Outcome, beir_folders: list[Path]) -> StageTwo:
    """Mine hard negatives with the checkpoint of Stage I and train on them, from that checkpoint."""
    folder, recipe, seconds = outcome.folder, outcome.recipe, outcome.seconds
    with _timed(seconds, "mine", "mining hard negatives with the trained model"):
        rules = Rules(num_negatives=NUM_NEGATIVES, relative_margin=0.0, seed=recipe.seed)
        mining = Mining(str(folder / "prepared"), outcome.checkpoint, folder / "mined", rules)
        mined = finish(mining, *mine_rank(mining, 0, 1, 0))
    spec = write_spec(folder / "stage2.json", stage_two_keys(outcome, beir_folders))
    steps = recipe.stage_two_steps
    doing = f"Stage II: {steps} steps of {recipe.pairs_per_step} rows of up to {2 + NUM_NEGATIVES} texts"
    with _timed(seconds, "train_stage2", doing):
        train(folder / "stage2.json")
    checkpoint = spec.run_folder / f"checkpoint-{steps}"
    with _timed(seconds, "evaluate_stage2", "evaluating it on the same questions"):
        after = measure(checkpoint, beir_folders)
    return StageTwo(checkpoint, after, mined["rows"], mined["negatives"])


@contextmanager
def _timed(seconds: dict[str, float], name: str, doing: str) -> Iterator[None]:
    say(f"{len(seconds) + 1}. {doing}")
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def _clear(folder: Path) -> None:
    """An empty folder with a marker in it, whatever an earlier demo left there."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise InputError(f"{folder}: exists and was not made by anchor demo", "choose another folder: --out DIR")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARKER, {})


def make_model(folder: Path, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
    """A Qwen3 of random float32 weights and its tokenizer: one token for each of the world's words if none is given."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tokenizer or train_small_tokenizer(vocabulary(), ["user", *INSTRUCTIONS.values()])
    heads = 4
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        max_window_layers=recipe.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=recipe.hidden_size // heads,
        max_position_embeddings=1024,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    write_small_tokenizer(tokenizer, folder)


def make_inputs(folder: Path, recipe: Recipe) -> tuple[Path, list[Path]]:
    """world/ and model/ of a seed: the file of training pairs, and the benchmarks."""
    inputs = write_world(make_world(recipe.seed, recipe.num_documents), folder / "world")
    make_model(folder / "model", recipe)
    return inputs


def prepare_pairs(folder: Path, train_file: Path, max_seq_length: int) -> None:
    """prepared/: the training pairs, each with the instruction of its language."""
    prepare(
        [str(train_file)],
        folder / "prepared",
        tokenizer=folder / "model",
        max_seq_length=max_seq_length,
        options=Options(query_column="anchor", document_column="positive", language_column="language"),
        instructions=INSTRUCTIONS,
        training_instructions=INSTRUCTIONS,
    )


def stage_one_keys(folder: Path, recipe: Recipe, beir_folders: list[Path]) -> dict[str, Any]:
    """The spec of the demo's training run."""
    return {
        "model_name_or_path": str((folder / "model").absolute()),
        "dataset_name": "demo",
        "dataset_file_path": str((folder / "prepared").absolute()),
        "output_dir": str(folder.absolute()),
        "experiment_id": "run",
        "max_seq_length": recipe.max_seq_length,
        "instructions": INSTRUCTIONS,
        "reconstruction_targets": "content",
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup_steps,
        "max_steps": recipe.steps,
        "global_batch_size": recipe.pairs_per_step,
        "precision": "float32",
        "attn_implementation": "sdpa",
        "seed": recipe.seed,
        "logging_steps": 10,
        "save_steps": 0.0,
        "eval_steps": 0.2,
        "eval_data": [str(path.absolute()) for path in beir_folders],
    }


def stage_two_keys(outcome: Outcome, beir_folders: list[Path]) -> dict[str, Any]:
    """The spec of its Stage II: InfoNCE on the mined rows."""
    folder, recipe = outcome.folder, outcome.recipe
    keys = stage_one_keys(folder, recipe, beir_folders)
    del keys["reconstruction_targets"]
    return keys | {
        "stage": "II",
        "model_name_or_path": str(outcome.checkpoint.absolute()),
        "dataset_file_path": str((folder / "mined").absolute()),
        "experiment_id": "stage2",
        "temperature": 0.05,
        "learning_rate": 1e-3,
        "warmup_steps": max(1, recipe.stage_two_steps // 10),
        "max_steps": recipe.stage_two_steps,
        "eval_steps": 0.5,
    }


def write_spec(path: Path, keys: dict[str, Any]) -> RunSpec:
    """The keys as a spec file, and the spec."""
    write_json(path, keys)
    return RunSpec.model_validate(keys)


def train(spec_path: Path) -> None:
    """`anchor train SPEC` on the CPU, in a process of its own; its output goes to this terminal.

    Raises:
        Stopped: a signal came, and it saved.
        RunError: it failed; its message is on the terminal.
    """
    command = [sys.executable, "-m", "anchor_cli", "train", str(spec_path), "--nproc-per-node", "1"]
    code = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False).returncode
    if code == Stopped.exit_code:
        raise Stopped("anchor demo: stopped while training", f"anchor train {spec_path} goes on with it")
    if code:
        raise RunError(f"anchor train {spec_path}: exit code {code}", "its own message is above")


def measure(model: Path, beir_folders: list[Path]) -> dict[str, Any]:
    """`evaluate`'s document for the held-out questions of both languages, scores only."""
    benchmarks = load_benchmarks([f"{path.name.rpartition('-')[2]}:{path}" for path in beir_folders])
    outcome = evaluate(load_embedder(model, device="cpu"), benchmarks, metrics=METRICS)
    scores = {name: {key: row[key] for key in METRICS} for name, row in outcome["results"].items()}
    return {"results": scores, "avg": {key: outcome["avg"][key] for key in METRICS}}
