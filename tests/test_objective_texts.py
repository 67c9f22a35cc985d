"""The loss is right on real texts: truncated, with the separator, special-token strings, one token, emoji, mixed.

From strings to gradients: the naive side tokenises the templated string by itself and marks content by brute force.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchor_cli.data.text import SEPARATOR, TextEncoder, load_tokenizer
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel

TEMPLATE = "<|im_start|>user\n{text}<|im_end|>"
INSTRUCTION = "주어진 질문에 대해 관련 문서를 검색하세요"
LENGTH = 96
PAIRS = [
    ("수달은 어디에 사나요?", "수달은 강과 바다에 사는 동물이다. " * 40),  # truncated document
    ("otter " * 200, "Otters live in rivers and in the sea."),  # truncated query
    (f"{SEPARATOR}what is {SEPARATOR}?", f"before {SEPARATOR} after"),
    ("<|im_end|> inside", "a <|im_start|>user\nfake turn<|im_end|> and more"),
    ("a", "b"),
    ("  \t수", "."),
    ("🦦🦦 수달 emoji 👩‍👩‍👧‍👦", "한글 and Latin 섞인 글 ½ ① é é"),
    ("line\nbreaks\n\n", "\n trailing spaces   "),
]


def content_tokens(tokenizer: AutoTokenizer, text: str, begin: int, end: int) -> tuple[list[int], list[bool]]:
    """Ids of the whole templated string, and which tokens overlap characters begin … end of it."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return out["input_ids"], [left < end and right > begin for left, right in out["offset_mapping"]]


def naive_texts(model: Path) -> list[tuple[list[int], list[bool]]]:
    """Queries then documents: (ids, content mask), truncated at the content's end, [EOS] kept."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for instruction, contents in ((INSTRUCTION, [q for q, _ in PAIRS]), (None, [d for _, d in PAIRS])):
        for content in contents:
            text = (f"{instruction}; {content}" if instruction else content).strip()
            head = len(f"{instruction}; ") if instruction else 0
            whole = TEMPLATE.replace("{text}", text)
            start = len("<|im_start|>user\n")
            ids, mask = content_tokens(tokenizer, whole, start + head, start + len(text))
            if len(ids) > LENGTH:
                ids, mask = [*ids[: LENGTH - 1], ids[-1]], [*mask[: LENGTH - 1], mask[-1]]
            texts.append((ids, mask))
    return texts


Text = tuple[list[int], list[bool]]  # ids, content mask


def naive_loss(model: torch.nn.Module, texts: list[Text], targets: str, eos: int) -> torch.Tensor:
    """0.8 CE(D2Q) + 0.2 CE(Q2D), text by text, through the stock model."""
    num_pairs = len(texts) // 2
    embeddings = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids, _ in texts]
    losses: list[list[torch.Tensor]] = [[], []]
    for i, (ids, mask) in enumerate(texts):
        other = embeddings[(i + num_pairs) % (2 * num_pairs)]
        inputs = torch.cat([other[None], model.model.embed_tokens(torch.tensor(ids[: len(ids) - 2], dtype=torch.long))])
        logits = model.lm_head(model.model(inputs_embeds=inputs[None]).last_hidden_state[0])
        for k in range(len(ids) - 1):
            if ids[k] != eos and (targets == "text" or mask[k]):
                losses[i >= num_pairs].append(F.cross_entropy(logits[k], torch.tensor(ids[k])))
    return 0.8 * torch.stack(losses[0]).mean() + 0.2 * torch.stack(losses[1]).mean()


def check(model_folder: Path, dtype: torch.dtype, targets: str, relative: float) -> None:
    texts = naive_texts(model_folder)
    tokenizer = load_tokenizer(model_folder)
    encoder = TextEncoder(tokenizer, TEMPLATE, LENGTH)
    queries = encoder.encode_batch([q for q, _ in PAIRS], INSTRUCTION)
    documents = encoder.encode_batch([d for _, d in PAIRS], None)
    for ours, (ids, mask) in zip([*queries, *documents], texts, strict=True):
        assert ours.ids.tolist() == ids
        assert [ours.content_start <= k < len(ids) - 1 for k in range(len(ids))] == mask

    batch = pack_pairs(
        [t.ids for t in queries],
        [t.ids for t in documents],
        np.array([t.content_start for t in queries]),
        np.array([t.content_start for t in documents]),
        eos_token_id=encoder.eos_token_id,
        targets=targets,
    )
    ours = ReconstructionModel(load_backbone(model_folder, dtype=dtype), kernel="sdpa")
    loss = ours(batch, 0.8 / batch.num_query_targets, 0.2 / (len(batch.target_ids) - batch.num_query_targets)).loss
    loss.backward()
    theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, attn_implementation="sdpa")
    want = naive_loss(theirs, texts, targets, encoder.eos_token_id)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=relative)
    gradients = dict(ours.language_model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (gradients[name].grad - parameter.grad).norm() <= relative * parameter.grad.norm(), name


@pytest.mark.parametrize("targets", ["text", "content"])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_small_vocabulary(small_model: Path, dtype: torch.dtype, targets: str, relative: float) -> None:
    check(small_model, dtype, targets, relative)


@pytest.mark.parametrize("targets", ["text", "content"])
def test_real_vocabulary(tiny_model: Path, targets: str) -> None:
    check(tiny_model, torch.float32, targets, 1e-5)


def test_a_pad_token_in_the_config_does_not_stop_eos_from_learning(small_model: Path, tmp_path: Path) -> None:
    """Many configs name [EOS] as the pad token; its embedding row must still get a gradient."""
    shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((small_model / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    model = load_backbone(tmp_path / "model", dtype=torch.float32)
    assert model.config.pad_token_id == model.config.eos_token_id
    embed = model.get_input_embeddings()
    embed(torch.tensor([model.config.eos_token_id])).sum().backward()
    assert embed.weight.grad[model.config.eos_token_id].norm() > 0
