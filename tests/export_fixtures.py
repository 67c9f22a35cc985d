"""What the tests of `anchor export` share: runs with checkpoints that need no training, awkward texts, naive ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from anchor_cli.base.contract import TEXT_TEMPLATE, TextContract, write_contract
from anchor_cli.data.text import eos_of, load_tokenizer, tokenizer_fingerprint
from anchor_cli.train.saving import commit

PIECES = (
    "수달은 어디에 사나요? 서소문본관 합동소방훈련 한글 \u1112\u1161\u11ab the otter lives in a river, doesn't it? "
    "e\u0301 12 3,456 👨‍👩‍👧 ﷽ 𠮷 \u200b \ufeff \x00 <think> ｆｕｌｌ !@#$%^&*() … a b c 가 나 다"
).split(" ")
SPACES = (" ", " ", " ", "  ", "\n", "\t", "\r\n", "\u3000", "\xa0", "\x1c", "\u2003")


def make_contract(model: Path, **changes: Any) -> TextContract:
    """The contract of a small run: 48 tokens."""
    tokenizer = load_tokenizer(model)
    eos_token, eos_token_id = eos_of(tokenizer, TEXT_TEMPLATE)
    values = {"max_seq_length": 48, "eos_token": eos_token, "eos_token_id": eos_token_id} | changes
    return TextContract(tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), **values)


def make_checkpoint(run: Path, step: int, model: Path, contract: TextContract) -> Path:
    """`model` as the checkpoint of a run, with the files, states and manifest of one."""
    partial = run / f".checkpoint-{step}.partial"
    shutil.copytree(model, partial)
    write_contract(partial, contract)
    spec = {
        "model_name_or_path": str(model),
        "dataset_name": "KoEnQP",
        "dataset_file_path": "/data/pairs",
        "output_dir": str(run.parent),
        "learning_rate": 4e-5,
        "max_seq_length": contract.max_seq_length,
        "precision": "float32",
        "seed": 42,
    }
    state = {
        "step": step,
        "total_steps": 10,
        "global_batch_size": 8,
        "spec": spec,
        "data_fingerprint": "of the data",
        "best": None,
    }
    (partial / "training_state.json").write_text(json.dumps(state), encoding="utf-8")
    commit(partial, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def log_scores(run: Path, scores: dict[int, float]) -> None:
    """Evaluation lines of a run, {step: nDCG@10}."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step, score in scores.items():
            line = {"step": step, "epoch": 0.1, "time": 0.0}
            for name in ("ko/NanoNQ", "avg"):
                line |= {f"eval/{name}/ndcg@10": score, f"eval/{name}/mrr@10": 0.25}
            file.write(json.dumps(line) + "\n")


def random_texts(num: int, seed: int, *, longest: int = 60) -> list[str]:
    """Korean, English and awkward pieces with all kinds of white space, blank ends included."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num):
        pieces = [rng.choice(PIECES) for _ in range(rng.randint(0, longest))]
        text = "".join(piece + rng.choice(SPACES) for piece in pieces)
        texts.append(rng.choice(SPACES) * rng.randint(0, 2) + text if rng.random() < 0.3 else text.strip())
    return texts


def texts_around_limit(count: Any, limit: int, num: int, seed: int) -> list[str]:
    """Texts whose `count(text)` tokens lie within a few of `limit`, on both sides."""
    rng = random.Random(seed)
    texts = []
    while len(texts) < num:
        text = rng.choice(PIECES)
        target = limit + rng.randint(-4, 4)
        while count(text) < target:
            text += rng.choice(SPACES) + rng.choice(PIECES)
        texts.append(text)
    return texts
