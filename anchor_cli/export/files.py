"""The files of an export besides weights and tokenizer: what sentence-transformers, LLM2Vec and Stage II read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import TRAINING_STATE
from anchor_cli.base.contract import TextContract, query_prefix
from anchor_cli.base.files import write_json
from anchor_cli.base.metric_names import EVAL_PREFIX, STEP
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.data.pairs import MANIFEST as PREPARED_MANIFEST
from anchor_cli.export.tokenizer import longest_text

_POOLING_OF_LIBRARY = {"eos_token": "pooling_mode_lasttoken", "last_token": "pooling_mode_lasttoken"}
_POOLING_FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
CONTENT_POOLING = "anchor_pooling"
"""Module file of an export whose pooling no stock module can do."""
KURE_RECIPE = {
    "loss": "SelfGuidedLoss",
    "temperature": 0.01,
    "margin_strategy": "absolute",
    "margin": -0.1,
    "hardness_mode": "explicit_negatives",
    "hardness_strength": 5.0,
    "num_hard_negatives": 7,
    "per_device_train_batch_size": 2048,
    "mini_batch_size": 16,
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    "warmup_steps": 0.1,
    "gradient_checkpointing": False,
    "eval_steps": 0.05,
    "save_steps": 0.2,
    "logging_steps": 1,
}
"""Stage II as KURE runs it: a block of 2,048 rows is one GPU's batch. The same as train_configs/stage_II/, there in the
keys of `anchor train`."""


def prompts(contract: TextContract) -> dict[str, str]:
    """Prompts by name: the template's head and the instruction, put before a text as they are.

    `query` has the instruction of training rows, `query_{language}` that of the language, `document` none. An empty
    instruction is none.
    """
    head = contract.text_template.split("{text}")[0]

    named = contract.named_instructions
    usual = contract.training_instructions.get("*", next(iter(named.values())))
    by_language = {f"query_{code}": head + query_prefix(text) for code, text in named.items()}
    return {"query": head + query_prefix(usual), "document": head} | by_language


def needs_own_pooling(contract: TextContract) -> bool:
    """`mean` and `weighted_mean` pool content tokens only, which no stock module of sentence-transformers does."""
    return contract.pooling_mode not in _POOLING_OF_LIBRARY


def write_library_files(folder: Path, contract: TextContract, dimension: int, space_ids: list[int]) -> None:
    """What sentence-transformers reads, in names that its versions 5 and 6, vLLM and text-embeddings-inference know.

    `space_ids`: tokens that are one blank, for pooling of content only.
    """
    own = needs_own_pooling(contract)
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    if own:
        types[1] = f"{CONTENT_POOLING}.ContentPooling"
    types.append("sentence_transformers.models.Normalize")
    placed = enumerate(zip(("", "1_Pooling", "2_Normalize"), types, strict=True))
    modules = [{"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in placed]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest_text(contract), "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts(contract),
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    if own:
        source = Path(__file__).with_name("pooling.py").read_text(encoding="utf-8")
        (folder / f"{CONTENT_POOLING}.py").write_text(source, encoding="utf-8")
        pooling: dict[str, Any] = {
            "embedding_dimension": dimension,
            "pooling_mode": contract.pooling_mode,
            "space_token_ids": space_ids,
        }
    else:
        chosen = _POOLING_OF_LIBRARY[contract.pooling_mode]
        flags = {f"pooling_mode_{flag}": f"pooling_mode_{flag}" == chosen for flag in _POOLING_FLAGS}
        pooling = {"word_embedding_dimension": dimension, **flags, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "2_Normalize" / "config.json", {})


def stage_two_config(model: str, contract: TextContract, state: dict[str, Any]) -> dict[str, Any]:
    """`stage_II.json`: contrastive training of `model`, a flat object with the names of transformers 5.

    `warmup_steps` below 1 is a share of all steps. Batch size, learning rate and temperature are common choices for a
    model of this size, an assumption to be tuned. `recipes`: other values by name, over these.
    """
    spec = state.get("spec", {})
    named = prompts(contract)
    return {
        "model_name_or_path": model,
        "dataset_file_path": spec.get("dataset_file_path"),
        "output_dir": "output/stage_II",
        "max_seq_length": contract.max_seq_length,
        "pooling_mode": contract.pooling_mode,
        "text_template": contract.text_template,
        "instructions": contract.instructions,
        "prompts": {"anchor": named["query"], "positive": named["document"], "negative": named["document"]},
        "loss": "MultipleNegativesRankingLoss",
        "temperature": 0.05,
        "batch_sampler": "no_duplicates",
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": spec.get("precision", "bfloat16") == "bfloat16",
        "gradient_checkpointing": True,
        "seed": spec.get("seed", 42),
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "recipes": {"kure": KURE_RECIPE},
    }


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """`training_state.json`, or an empty object for a folder that is no checkpoint."""
    path = checkpoint / TRAINING_STATE
    if not path.is_file():
        return {}
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def scores_of(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """`scores.json`: the checkpoint's retrieval scores as its run logged them; none when it was not evaluated."""
    scores: dict[str, float] = {}
    for line in read_json_lines(RunFolder(checkpoint.parent).metrics) if state else []:
        if line.get(STEP) == state["step"]:
            scores |= {key: value for key, value in line.items() if key.startswith(EVAL_PREFIX)}
    return {"checkpoint": checkpoint.name, "step": state.get("step"), "eval": scores}


def data_counts(state: dict[str, Any]) -> dict[str, Any] | None:
    """Rows of the training set and pairs seen; the set is found by its fingerprint, None when it is no longer there."""
    spec = state.get("spec", {})
    places = [Path(spec.get("dataset_file_path", ""))]
    places += sorted(Path(spec.get("output_dir", "")).expanduser().glob("prepared/*"))
    for place in places:
        try:
            manifest = json.loads((place.expanduser() / PREPARED_MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if manifest.get("fingerprint") == state.get("data_fingerprint"):
            return {"rows": int(manifest["num_rows"]), "pairs_seen": state["step"] * state["global_batch_size"]}
    return None
