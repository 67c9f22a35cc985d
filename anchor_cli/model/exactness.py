"""Whether our packed pass and our loss compute what the stock model computes: tried on a few tokens, no list of names.

Packing is exact only for a model whose layers call the attention function that it was loaded with, pass the text
boundaries on to it, take positions from `position_ids`, and mix tokens nowhere else (as ALiBi, recurrence and
convolutions do). So a small model of the same class and configuration, with random weights, encodes texts packed beside
each other, and each of them alone with stock attention. The loss is exact only where the logits are the hidden states
times the output matrix, or a multiple of it: that is tried on the real weights, without running the layers.

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from anchor_cli.base.errors import InputError, first_line
from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.encoder import packed_hidden_states
from anchor_cli.model.packed import pack_texts
from anchor_cli.model.pooling import pooled_rows, prune_last_layer

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference of a hidden state, relative to its length. In float32 rounding stays below 1e-5."""
_TEXTS = ((7, 3, 11, 5), (2, 13, 9, 4, 6), (8, 12))  # token ids
_CHANGED = ((10, 3, 11, 5),)  # the first text with another beginning
_MOST_LAYERS, _VOCABULARY, _WIDTH = 4, 64, 64  # of a small model
_EXPERTS, _FEW_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8
_MOST_PARAMETERS = 100_000_000  # of a model that is built only to be tried


@dataclass(frozen=True)
class Trial:
    """What a small model of a configuration showed. A `problem` is the end of the sentence "… has"/"… because"."""

    packing_problem: str | None = None
    output_problem: str | None = None
    was_tried: bool = True
    """False: no small model could be built; `load_backbone` then tries the real one."""
    prunes: bool = False
    """The last layer gives the same where it is computed in pooled rows only (model/pooling.py)."""


_trials: dict[str, Trial] = {}


def try_configuration(config: PretrainedConfig) -> Trial:
    """Try a small model of `config`, once a process. The process's random numbers stay as they are."""
    key = type(config).__name__ + config.to_json_string(use_diff=False)
    if key not in _trials:
        with _quiet(), torch.random.fork_rng(devices=[]):
            _trials[key] = _try(config)
    return _trials[key]


def _try(config: PretrainedConfig) -> Trial:
    for narrow in (True, False):
        try:
            model = _random_model(shrunk_config(config, narrow=narrow))
            theirs, changed = stock_states(model), stock_states(model, _CHANGED)
        except Exception as error:  # sizes that do not go together: the next ones may
            if isinstance(error, KeyError) and PACKED_ATTENTION in str(error):
                return Trial("its class takes no attention function but its own")
            continue
        if _relative(changed[0][-1:], theirs[0][-1:]) < 10 * TOLERANCE[torch.float32]:
            continue  # its last token sees nothing of its first, so a trial would show nothing
        return Trial(packing_problem(model, theirs), output_problem(model), prunes=_prunes(model))
    return Trial(was_tried=False)


def packing_problem(model: PreTrainedModel, theirs: list[torch.Tensor] | None = None) -> str | None:
    """Why texts packed beside each other are not encoded as they are alone, or None: they are."""
    try:
        theirs = stock_states(model) if theirs is None else theirs
    except Exception as error:
        return f"its stock forward pass could not be compared with ours ({first_line(error)})"
    packed = pack_texts([np.array(text, dtype=np.int32) for text in _TEXTS])
    try:
        with torch.no_grad():
            inputs = model.get_input_embeddings()(packed.input_ids)
            ours = packed_hidden_states(model, inputs, packed, "sdpa").split(list(packed.lengths))
    except InputError as error:
        return error.message
    except Exception as error:
        if "packing" in str(error):
            return "its layers do not pass text boundaries on to the attention function"
        return f"its layers do not take packed texts ({first_line(error)})"
    largest = max(_relative(a, b) for a, b in zip(ours, theirs, strict=True))
    if largest <= TOLERANCE[theirs[0].dtype]:
        return None
    return f"a text's hidden states beside other texts differ from those of the text alone by {largest:.1%}"


@torch.no_grad()
def _prunes(model: PreTrainedModel) -> bool:
    """Whether a pruned last layer gives the pooled rows as the whole one does; the model is pruned afterwards."""
    packed = pack_texts([np.array(text, dtype=np.int32) for text in _TEXTS])
    rows = pooled_rows(packed.cu_seqlens, "last_token")
    try:
        inputs = model.get_input_embeddings()(packed.input_ids)
        theirs = packed_hidden_states(model, inputs, packed, "sdpa")[rows]
        ours = packed_hidden_states(model, inputs, packed, "sdpa", rows) if prune_last_layer(model) else None
    except Exception:  # whatever another layer makes of fewer rows: it is computed whole then
        return False
    return ours is not None and ours.shape == theirs.shape and _relative(ours, theirs) <= TOLERANCE[ours.dtype]


@torch.no_grad()
def stock_states(model: PreTrainedModel, texts: Sequence[Sequence[int]] = _TEXTS) -> list[torch.Tensor]:
    """[(T, D)] hidden states of each text alone, by the stock forward pass with the stock eager attention."""
    model.set_attn_implementation("eager")
    try:
        decoder = model.get_decoder()
        ids = [torch.tensor(text, device=model.device)[None] for text in texts]
        return [decoder(input_ids=text, use_cache=False).last_hidden_state[0] for text in ids]
    finally:
        model.set_attn_implementation(PACKED_ATTENTION)


def output_problem(model: PreTrainedModel) -> str | None:
    """Why the stock logits are not a multiple of hidden states times output matrix, or None: they are."""
    try:
        logit_scale(model)
    except InputError as error:
        return error.message
    return None


@torch.no_grad()
def logit_scale(model: PreTrainedModel) -> float:
    """s, where the stock model's logits are s · hidden · Wᵀ; 1.0 for most. The decoder is passed over: D numbers go in.

    Raises:
        InputError: the logits are another function of the hidden states.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise InputError("no output matrix that the loss could use")
    if getattr(head, "bias", None) is not None:
        raise InputError("an output layer with a bias")
    weight = head.weight
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden[:, 2:] *= 1000.0  # soft-capping shows only where logits are large
    hidden = hidden.to(weight.device, weight.dtype)
    decoder = model.get_decoder()
    object.__setattr__(decoder, "forward", lambda *_, **__: _Output(last_hidden_state=hidden))
    try:
        logits = model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=weight.device), use_cache=False).logits
    except Exception as error:
        raise InputError(f"an output layer that could not be tried ({first_line(error)})") from error
    finally:
        del decoder.forward
    theirs, plain = logits[0].double(), F.linear(hidden, weight)[0].double()
    if theirs.shape != plain.shape:
        raise InputError(f"logits of {theirs.shape[-1]} classes where the output matrix has {plain.shape[-1]}")
    scale = float((theirs * plain).sum() / plain.square().sum())
    if _relative(scale * plain, theirs) > TOLERANCE[weight.dtype] / 10:
        raise InputError("logits that are not a multiple of hidden states times the output matrix")
    return 1.0 if abs(scale - 1) < 1e-4 else scale


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of a row, relative to its length; 9.99 where there are numbers that are none."""
    a, b = ours.double(), theirs.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).nan_to_num(nan=9.99).max())


class _Output(BaseModelOutputWithPast):
    """A decoder's output that lacks nothing by name: router logits and the like are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def shrunk_config(config: PretrainedConfig, *, narrow: bool) -> PretrainedConfig:
    """A configuration of the same kind with few and, if `narrow`, narrow layers; whatever else it says is kept."""
    small = copy.deepcopy(config)
    for part in {id(part): part for part in (small, small.get_text_config())}.values():
        _shrink(part, narrow)
    return small


def _shrink(config: Any, narrow: bool) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        kept = _layers_of_each_kind(config, layers)
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(config, name, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
    smaller: dict[str, int | None] = {
        "vocab_size": _VOCABULARY,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    widths = [name for name in vars(config) if name.endswith("intermediate_size")]
    smaller |= {name: 2 * _WIDTH for name in (*widths, "ffn_dim", "d_ff", "n_inner") if _int(config, name)}
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    experts = [name for name in _EXPERTS if (_int(config, name) or 0) > _FEW_EXPERTS]
    if experts and (_int(config, "num_experts_per_tok") or 0) <= _FEW_EXPERTS:
        smaller |= dict.fromkeys(experts, _FEW_EXPERTS) | dict.fromkeys(("n_group", "topk_group"), 1)
    if narrow and hidden:
        if heads:  # as wide as before, fewer of them: whatever belongs to a head's width still fits
            groups = _int(config, "num_key_value_heads") or heads
            fewer = min(groups, 4 if groups == heads else 2)
            queries = fewer * min(heads // groups, 2)
            smaller |= {"num_attention_heads": queries, "num_key_value_heads": fewer}
            width = _int(config, "head_dim") or hidden // heads
            smaller |= {"hidden_size": queries * width, "head_dim": width}
        else:
            smaller["hidden_size"] = min(hidden, _WIDTH)
    for name, number in smaller.items():
        if hasattr(config, name):
            setattr(config, name, number)


def _int(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _layers_of_each_kind(config: Any, layers: int) -> list[int]:
    """A few layers, among them the first of every kind that the configuration's lists tell apart."""
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers]
    kinds = [repr([each[index] for each in lists]) for index in range(layers)]
    return sorted({*range(min(layers, _MOST_LAYERS)), *(kinds.index(kind) for kind in kinds)})


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of `config` in float32, no parameter zero or left as it is initialised."""
    register()
    with torch.device("meta"):
        sizes = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(parameter.numel() for parameter in sizes.parameters()) > _MOST_PARAMETERS:
        raise ValueError("too large to be built only to be tried")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=PACKED_ATTENTION, dtype=torch.float32
    ).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        weights = noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter.detach() + 0.1 * noise
        parameter.data.copy_(weights)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings about a model that nobody will use."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
