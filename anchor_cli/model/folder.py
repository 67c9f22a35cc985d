"""A model's folder: weights, a config.json that older readers understand too, and the text contract."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from anchor_cli.base.contract import TextContract, write_contract, write_llm2vec_config
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import write_json

_NEWER = ("rope_parameters", "layer_types")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    contract: TextContract,
    *,
    max_shard_size: str = "1TB",
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Weights, config.json, anchor.json and llm2vec_config.json into `folder`.

    The config says nothing of our attention: any tool loads the folder as the stock model it is.

    Args:
        state_dict: the weights, where the model's own are not whole (partitioned by ZeRO-3).
    """
    model.config.use_cache = True
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")):  # it imports deepspeed, which prints
            model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    finally:
        model.config.use_cache = False
    config = read_config(folder)
    write_json(folder / "config.json", config | older_fields(type(model.config), config))
    write_contract(folder, contract.model_copy(update={"dtype": str(model.dtype).removeprefix("torch.")}))
    write_llm2vec_config(folder, contract)


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a local model folder, without importing the model. Raises InputError."""
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a model configuration ({error})") from error
    return config


def older_fields(kind: type[PretrainedConfig], config: dict[str, Any]) -> dict[str, Any]:
    """Fields of transformers 4 that say the same as those that transformers 5 renamed.

    transformers 4, vLLM and text-embeddings-inference of its time know no `rope_parameters`; without `rope_theta` they
    silently take a base of 10,000. Whether names of transformers 4 say the same, is decided by reading them back: the
    class must make the same `rope_parameters` of them alone. Where no names do, none are written.
    """
    fields: dict[str, Any] = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    want = config.get("rope_parameters")
    if want:
        for candidate in _rope_in_older_names(want, config):
            if _read_back(kind, config, candidate).get("rope_parameters") == want:
                fields |= candidate
                break
    pattern = _sliding_window_pattern(config.get("layer_types"))
    if pattern:
        read = _read_back(kind, config, {"sliding_window_pattern": pattern})
        if read.get("layer_types") == config["layer_types"]:
            fields["sliding_window_pattern"] = pattern
    return fields


def _rope_in_older_names(rope: dict[str, Any], config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How models of transformers 4 wrote rotary parameters, the commonest way first."""
    if "rope_theta" in rope:
        scaling = {"rope_scaling": _older_scaling(rope, config)}
        partial = rope.get("partial_rotary_factor")
        if partial is not None and config.get("model_type", "").startswith("gpt_neox"):
            yield {"rotary_emb_base": rope["rope_theta"], "rotary_pct": partial} | scaling
        yield (
            {"rope_theta": rope["rope_theta"]}
            | scaling
            | ({} if partial is None else {"partial_rotary_factor": partial})
        )
        return
    whole, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if "rope_theta" in whole and "rope_theta" in local:
        scaling = {"rope_scaling": _older_scaling(whole, config)}
        base, base_of_windows = whole["rope_theta"], local["rope_theta"]
        yield {"rope_theta": base, "rope_local_base_freq": base_of_windows} | scaling
        yield {"global_rope_theta": base, "local_rope_theta": base_of_windows} | scaling
        if whole == local:
            yield {"rope_theta": base} | scaling


def _older_scaling(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4.

    Its YaRN takes max_position_embeddings / original_max_position_embeddings instead of `factor` where the latter is
    there; transformers 5 fills it in with max_position_embeddings, which there would mean a factor of 1.
    """
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    same = rest.get("original_max_position_embeddings") == config.get("max_position_embeddings")
    if rest.get("rope_type") == "yarn" and same:
        del rest["original_max_position_embeddings"]
    return None if rest == {"rope_type": "default"} else rest


def _sliding_window_pattern(layer_types: list[str] | None) -> int | None:
    """n, where every n-th layer alone attends fully and the others over a window (Gemma 3, Cohere 2, Olmo 3)."""
    if not layer_types or set(layer_types) != {"full_attention", "sliding_attention"}:
        return None
    n = layer_types.index("full_attention") + 1
    want = ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(len(layer_types))]
    return n if layer_types == want else None


def _read_back(kind: type[PretrainedConfig], config: dict[str, Any], older: dict[str, Any]) -> dict[str, Any]:
    """The config that `kind` makes of the older names, the newer ones left out."""
    left = {key: copy.deepcopy(value) for key, value in config.items() if key not in _NEWER}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it warns of whatever it misses
    try:
        read: dict[str, Any] = kind.from_dict(left | copy.deepcopy(older)).to_dict()
    except Exception:  # a class that takes no such names
        return {}
    finally:
        logger.setLevel(level)
    return read
