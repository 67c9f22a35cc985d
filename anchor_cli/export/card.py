"""README.md of an export: what the model is, what it was trained on, how well it does, and how to use it.

The text is `card.md.jinja`; the YAML head is huggingface_hub's. Nothing in it names a host, a user or a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anchor_cli.base.contract import TextContract
from anchor_cli.base.hub import has_hub_form
from anchor_cli.base.metric_names import EVAL_PREFIX
from anchor_cli.export.files import needs_own_pooling, prompts

_KNOWN_LICENCES = {"Qwen/Qwen3-": "apache-2.0"}
"""Licences of base models by the beginning of their Hub id, as their model cards say."""
_KEYS_SHOWN = (
    "reconstruction_targets d2q_weight q2d_weight learning_rate lr_scheduler_type warmup_steps max_seq_length "
    "precision seed"
).split()
_KEYS_OF_STAGE_II = (
    "stage temperature in_batch_negatives negatives_group_size margin_strategy margin guide_model_name_or_path "
    "hardness_mode hardness_strength matryoshka_dims kd_weight learning_rate lr_scheduler_type warmup_steps "
    "max_seq_length precision seed"
).split()
_POOLED = {
    "eos_token": "the last hidden state of the closing `{eos}`",
    "last_token": "the last hidden state of the last content token",
    "mean": "the mean of the content tokens' last hidden states",
    "weighted_mean": "the position-weighted mean of the content tokens' last hidden states",
}
_TAGS = ["sentence-transformers", "feature-extraction", "retrieval", "anchor-embedding"]


def model_card(
    name: str,
    contract: TextContract,
    *,
    dimension: int,
    state: dict[str, Any],
    scores: dict[str, Any],
    counts: dict[str, Any] | None,
    parity: dict[str, Any],
    has_licence_file: bool,
) -> str:
    """The whole text."""
    from huggingface_hub import ModelCard, ModelCardData

    base, licence = base_model(state), licence_of(state)
    unknown = licence == "other"
    head = ModelCardData(
        language=list(contract.named_instructions),
        license=licence,
        license_name="see-base-model" if unknown else None,
        license_link="LICENSE" if unknown and has_licence_file else None,
        base_model=base if base and "/" in base else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=list(_TAGS),
    )
    card = ModelCard.from_template(
        head,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=name,
        contract=contract,
        dimension=dimension,
        state=state,
        parity=parity,
        base=base,
        licence=licence,
        pooled=_POOLED[contract.pooling_mode].format(eos=contract.eos_token),
        training=_training(state, counts) if state else [],
        scores=_by_benchmark(scores),
        prompts={key: json.dumps(text, ensure_ascii=False) for key, text in prompts(contract).items()},
        own_pooling=needs_own_pooling(contract),
        stage=state.get("spec", {}).get("stage", "I"),
        matryoshka=state.get("spec", {}).get("matryoshka_dims"),
        ways=sorted({check["against"] for check in parity["checks"]}),
        distance=max(0.0, 1 - min(check["lowest_cosine"] for check in parity["checks"])),
    )
    return str(card).rstrip() + "\n"


def base_model(state: dict[str, Any]) -> str | None:
    """Hub id of the base model, or the last part of its local path."""
    base = state.get("spec", {}).get("model_name_or_path")
    if not base:
        return None
    return Path(base).name if is_local(base) else str(base)


def is_local(model: str) -> bool:
    """Whether a model's name is a path: written like one, or a folder that is there."""
    return not has_hub_form(model) or Path(model).is_dir()


def licence_of(state: dict[str, Any]) -> str:
    """The base model's licence where it is known, else `other`."""
    base = base_model(state) or ""
    return next((licence for start, licence in _KNOWN_LICENCES.items() if base.startswith(start)), "other")


def licence_file(state: dict[str, Any]) -> Path | None:
    """The base model's own licence, where that is a local folder with one."""
    base = state.get("spec", {}).get("model_name_or_path")
    path = Path(base).expanduser() / "LICENSE" if base else None
    return path if path and path.is_file() else None


def _training(state: dict[str, Any], counts: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the table: key and value."""
    spec = state["spec"]
    rows = [("step", f"{state['step']:,} of {state['total_steps']:,}")]
    rows.append(("pairs a step", f"{state['global_batch_size']:,}"))
    if counts:
        rows += [("training pairs", f"{counts['rows']:,}"), ("pairs seen", f"{counts['pairs_seen']:,}")]
    if spec.get("dataset_name"):
        rows.append(("data", str(spec["dataset_name"])))
    shown = _KEYS_OF_STAGE_II if spec.get("stage") == "II" else _KEYS_SHOWN
    return rows + [
        (key, json.dumps(spec[key], ensure_ascii=False)) for key in shown if spec.get(key) not in (None, False)
    ]


def _by_benchmark(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{benchmark: {metric: value}} of those with nDCG@10."""
    grouped: dict[str, dict[str, float]] = {}
    for key, value in scores["eval"].items():
        benchmark, _, metric = key.removeprefix(EVAL_PREFIX).rpartition("/")
        grouped.setdefault(benchmark, {})[metric] = value
    return {name: each for name, each in grouped.items() if "ndcg@10" in each}
