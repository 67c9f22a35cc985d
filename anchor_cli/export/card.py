"""README.md of an export: what the model is, what it was trained on, how well it does, and how to use it."""

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


def model_card(
    name: str,
    contract: TextContract,
    *,
    dtype: str,
    dimension: int,
    state: dict[str, Any],
    scores: dict[str, Any],
    counts: dict[str, Any] | None,
    parity: dict[str, Any],
    has_licence_file: bool,
) -> str:
    """The whole text, with the YAML head that the Hub reads. Nothing in it names a host, a user or a token."""
    sections = [
        _head(contract, state, has_licence_file),
        f"# {name}",
        _what_it_is(contract, state, dtype, dimension),
        "## Training\n\n" + _training(state, counts),
        "## Retrieval scores\n\n" + _scores(scores),
        "## Use\n\n" + _use(name, contract),
        "## Checked\n\n" + _checked(parity),
        "## Licence\n\n" + _licence_note(state),
    ]
    return "\n\n".join(sections) + "\n"


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


def _head(contract: TextContract, state: dict[str, Any], has_licence_file: bool) -> str:
    lines = ["---", "language:", *(f"- {language}" for language in contract.named_instructions)]
    licence = licence_of(state)
    lines.append(f"license: {licence}")
    if licence == "other":
        lines += ["license_name: see-base-model", *(["license_link: LICENSE"] if has_licence_file else [])]
    base = base_model(state)
    if base and "/" in base:
        lines.append(f"base_model: {base}")
    lines += ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    lines += [f"- {tag}" for tag in ("sentence-transformers", "feature-extraction", "retrieval", "anchor-embedding")]
    return "\n".join([*lines, "---"])


def _what_it_is(contract: TextContract, state: dict[str, Any], dtype: str, dimension: int) -> str:
    base = base_model(state)
    made_of = f"`{base}`" if base else "a language model"
    trained = "after Stage I of [Anchor Embedding](https://arxiv.org/abs/2509.03020) (bidirectional reconstruction)"
    pooled = {
        "eos_token": f"the last hidden state of the closing `{contract.eos_token}`",
        "last_token": "the last hidden state of the last content token",
        "mean": "the mean of the content tokens' last hidden states",
        "weighted_mean": "the position-weighted mean of the content tokens' last hidden states",
    }[contract.pooling_mode]
    return (
        f"A text-embedding model: {made_of} {trained if state else 'as it is'}. "
        f"It is meant as the start of contrastive training (Stage II).\n\n"
        f"- Embedding: {pooled}; {dimension} numbers, compared by cosine\n"
        f"- Longest text: {contract.max_seq_length} tokens, template and `{contract.eos_token}` included\n"
        f"- Weights: {dtype}"
    )


def _training(state: dict[str, Any], counts: dict[str, Any] | None) -> str:
    if not state:
        return "Not trained by anchor: a plain model put into this form."
    spec = state["spec"]
    rows = [("step", f"{state['step']:,} of {state['total_steps']:,}")]
    rows.append(("pairs a step", f"{state['global_batch_size']:,}"))
    if counts:
        rows += [("training pairs", f"{counts['rows']:,}"), ("pairs seen", f"{counts['pairs_seen']:,}")]
    if spec.get("dataset_name"):
        rows.append(("data", str(spec["dataset_name"])))
    rows += [(key, json.dumps(spec[key], ensure_ascii=False)) for key in _KEYS_SHOWN if key in spec]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"| | |\n|---|---|\n{table}\n\nThe whole spec is in `spec.json`."


def _scores(scores: dict[str, Any]) -> str:
    found: dict[str, dict[str, float]] = {}
    for key, value in scores["eval"].items():
        benchmark, _, metric = key.removeprefix(EVAL_PREFIX).rpartition("/")
        found.setdefault(benchmark, {})[metric] = value
    found = {name: each for name, each in found.items() if "ndcg@10" in each}
    if not found:
        return "This checkpoint was not evaluated in its run. `anchor eval` measures it."
    rows = [f"| {name} | {each['ndcg@10']:.4f} | {each.get('mrr@10', 0.0):.4f} |" for name, each in found.items()]
    return "| benchmark | nDCG@10 | MRR@10 |\n|---|---|---|\n" + "\n".join(rows)


def _use(name: str, contract: TextContract) -> str:
    named = prompts(contract)
    query = json.dumps(named["query"], ensure_ascii=False)
    document = json.dumps(named["document"], ensure_ascii=False)
    trust = ", trust_remote_code=True" if needs_own_pooling(contract) else ""
    listed = "\n".join(f"- `{key}`: `{json.dumps(value, ensure_ascii=False)}`" for key, value in named.items())
    return f"""Prompts hold the template's head and the instruction; the tokenizer strips the text and closes it:

{listed}

sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{trust})
queries = model.encode_query(["수달은 어디에 사나요?"])  # or prompt_name="query_en"
documents = model.encode_document(["수달은 강과 바다에 산다."])
print(model.similarity(queries, documents))
```

transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")  # pads left
model = AutoModel.from_pretrained("{name}")
texts = [{query} + "수달은 어디에 사나요?", {document} + "수달은 강과 바다에 산다."]
with torch.no_grad():
    states = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).last_hidden_state
{_transformers_pooling(contract)}
```

anchor: `anchor eval {name}` evaluates it, and `model_name_or_path` of a spec may name it.

Stage II: `stage_II.json` is a ready configuration. LLM2Vec-style code reads `llm2vec_config.json`; code that writes
`{contract.eos_token}` behind the text itself may do so: the tokenizer does not close a text twice."""


def _transformers_pooling(contract: TextContract) -> str:
    if contract.pooling_mode in ("eos_token", "last_token"):
        return "embeddings = torch.nn.functional.normalize(states[:, -1], dim=1)"
    return "# pool the tokens behind the prompt, as anchor_pooling.py does"


def _checked(parity: dict[str, Any]) -> str:
    ways = sorted({check["against"] for check in parity["checks"]})
    lowest = min(check["lowest_cosine"] for check in parity["checks"])
    text = (
        f"`parity.json`: {parity['num_texts']} texts in both languages give the same token ids and the same vectors "
        f"(1 - cosine ≤ {max(0.0, 1 - lowest):.1e}) by anchor and by {', '.join(ways)}, in float32."
    )
    return text + "".join(f"\n\nNot checked: {line}." for line in parity["not_checked"])


def _licence_note(state: dict[str, Any]) -> str:
    licence = licence_of(state)
    if licence == "other":
        return (
            "Not known to the exporter: the licences of the base model and of the training data decide. Fill in "
            "`license`, `license_name` and `license_link` above before publishing."
        )
    return f"The base model is under {licence}. Whether the training data allow it is for the publisher to check."
