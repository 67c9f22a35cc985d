"""Pretrained models: what holds for random weights holds for real ones.

benchmarks/pretrained/make_models.py makes the folders; without them these tests are skipped. Slow: 135 and 270 million
parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from anchor_cli.base.contract import INSTRUCTION_EN
from anchor_cli.base.files import sha256_file
from anchor_cli.data.text import TextEncoder, load_tokenizer
from anchor_cli.export.export import export
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "pretrained"))
from make_models import SOURCES, model_folder

pytestmark = pytest.mark.slow
TEXTS = [
    ("Where do otters live?", "Otters live in rivers and along coasts, on every continent but Australia."),
    ("who pays the benefit", "The community centre pays it within 30 days of the application."),
    ("수달은 어디에 사나요?", "수달은 강에 산다."),
]
Gradients = dict[str, torch.Tensor]
Encoded = list[tuple[np.ndarray, np.ndarray, int, int]]


def folder_of(name: str) -> Path:
    folder = model_folder(name)
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there: python benchmarks/pretrained/make_models.py {name}")
    return folder


def encoded(folder: Path, name: str, num: int) -> tuple[Encoded, int]:
    """Pairs of (query ids, document ids, first content token of each), and the id of [EOS]."""
    encoder = TextEncoder(load_tokenizer(folder), SOURCES[name].text_template, 64)
    queries = encoder.encode_batch([query for query, _ in TEXTS[:num]], INSTRUCTION_EN)
    documents = encoder.encode_batch([document for _, document in TEXTS[:num]], None)
    rows = [(q.ids, d.ids, q.content_start, d.content_start) for q, d in zip(queries, documents, strict=True)]
    return rows, encoder.eos_token_id


def naive_loss(model: Any, pairs: Encoded, targets: str) -> torch.Tensor:
    """docs/method.md read aloud, one text at a time, on the stock model: 0.8 x mean D2Q + 0.2 x mean Q2D."""
    embed, decoder = model.get_input_embeddings(), model.get_decoder()

    def reconstruction(ids: np.ndarray, content_start: int, other: np.ndarray) -> list[torch.Tensor]:
        text, far = (torch.from_numpy(each.astype(np.int64)) for each in (ids, other))
        e = decoder(input_ids=far[None], use_cache=False).last_hidden_state[0, -1]
        inputs = torch.cat([e[None], embed(text[:-2])])
        logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0]
        first = content_start if targets == "content" else 0
        return [F.cross_entropy(logits[k], text[k]) for k in range(first, len(text) - 1)]

    d2q = [loss for q, d, start, _ in pairs for loss in reconstruction(q, start, d)]
    q2d = [loss for q, d, _, start in pairs for loss in reconstruction(d, start, q)]
    return 0.8 * torch.stack(d2q).mean() + 0.2 * torch.stack(q2d).mean()


def our_step(model: ReconstructionModel, pairs: Encoded, targets: str, eos: int) -> float:
    """Loss of a step in two micro-batches; gradients are accumulated."""
    batches = [
        pack_pairs(*[np.array(column) if index > 1 else list(column) for index, column in enumerate(zip(*part))],
                   eos_token_id=eos, targets=targets)
        for part in (pairs[:1], pairs[1:]) if part
    ]  # fmt: skip
    num_query = sum(batch.num_query_targets for batch in batches)
    num_document = sum(len(batch.target_ids) - batch.num_query_targets for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(batch, 0.8 / num_query, 0.2 / num_document).loss
        loss.backward()
        total += loss.item()
    return total


def stock_step(folder: Path, pairs: Encoded, targets: str, dtype: torch.dtype) -> tuple[float, Gradients]:
    """Loss and gradients of a sample of parameters by the naive loop."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    # [EOS] is SmolLM2's padding token, whose row torch's Embedding gives no gradient: most of the gradient is there.
    stock.get_input_embeddings().padding_idx = None
    loss = naive_loss(stock, pairs, targets)
    loss.backward()
    sample = {
        key: parameter.grad.double() for index, (key, parameter) in enumerate(stock.named_parameters())
        if parameter.grad is not None and (index % 12 == 0 or (parameter.ndim == 1 and index % 7 == 0))
    }  # fmt: skip
    return loss.item(), sample


def our_results(
    folder: Path, pairs: Encoded, targets: str, eos: int, dtype: torch.dtype, sample: Gradients
) -> tuple[float, Gradients]:
    """The same by anchor."""
    model = ReconstructionModel(load_backbone(folder, dtype=dtype, reconstructs=True), kernel="sdpa")
    loss = our_step(model, pairs, targets, eos)
    parameters = dict(model.language_model.named_parameters())
    return loss, {key: parameters[key].grad.double() for key in sample}


def distances(got: Gradients, want: Gradients) -> list[float]:
    assert len(want) > 10
    return [float((got[key] - want[key]).norm() / want[key].norm()) for key in want]


def test_smollm2_reads_digit_by_digit() -> None:
    """By SmolLM's tokenizer.json and in llama.cpp; transformers leaves this rule out of what it makes of GGUF."""
    folder = folder_of("smollm2")
    tokenizer, old = load_tokenizer(folder), f"{folder} was made before it did: remove it, run make_models.py smollm2"
    text = "What is  56? In 2026, 3\xa0% of 1,024; ｆｕｌｌ ①②③ ㎏ x² ½"
    pieces = [text[start:end] for start, end in tokenizer.encode(text).offsets]
    assert set("562026310241①②③²½") <= set(pieces), old
    assert [piece for piece in pieces if len(piece) > 1 and any(map(str.isnumeric, piece))] == [], old


@pytest.mark.parametrize(
    ("name", "num", "targets", "tolerance"),
    # Gemma 3's norms compute in float32, whatever the weights are.
    [("smollm2", 2, "text", 1e-10), ("smollm2", 2, "content", 1e-10), ("gemma3", 1, "content", 1e-6)],
)
def test_loss_and_gradients_equal_the_stock_model_one_text_at_a_time(
    name: str, num: int, targets: str, tolerance: float
) -> None:
    """Gemma 3 scales its embeddings, has local layers, and norms with an offset."""
    folder = folder_of(name)
    pairs, eos = encoded(folder, name, num)
    want, want_gradients = stock_step(folder, pairs, targets, torch.float64)
    got, gradients = our_results(folder, pairs, targets, eos, torch.float64, want_gradients)
    assert got == pytest.approx(want, rel=1e-10)
    assert max(distances(gradients, want_gradients)) <= tolerance


def test_in_float32_the_loss_is_equal_and_gradients_are_rounded_no_worse_than_the_stock_models() -> None:
    """Thirty layers round gradients to some 1e-4 in float32, the naive loop's, too: both are held against float64."""
    folder = folder_of("smollm2")
    pairs, eos = encoded(folder, "smollm2", 2)
    _, exact = stock_step(folder, pairs, "content", torch.float64)
    want, theirs = stock_step(folder, pairs, "content", torch.float32)
    got, ours = our_results(folder, pairs, "content", eos, torch.float32, exact)
    assert got == pytest.approx(want, rel=1e-5)
    mine, stock = max(distances(ours, exact)), max(distances(theirs, exact))
    print(f"largest distance to float64: ours {mine:.1e}, stock {stock:.1e}")
    assert mine <= 2 * stock


def test_a_resumed_run_is_bitwise_the_same_and_its_export_is_certified(tmp_path: Path) -> None:
    """`anchor train` in one go and stopped after the first step, on SmolLM2; then `anchor export` of the checkpoint."""
    folder = folder_of("smollm2")
    rows = [{"anchor": query, "positive": document} for query, document in TEXTS * 2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "model_name_or_path": str(folder),
        "dataset_file_path": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "runs"),
        "max_seq_length": 40,
        "instructions": {"*": INSTRUCTION_EN},
        "reconstruction_targets": "content",
        "max_steps": 2,
        "warmup_steps": 0,
        "global_batch_size": 2,
        "precision": "float32",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    for name, steps in (("whole", 2), ("resumed", 1), ("resumed", 2)):
        sets = [f"experiment_id={name}", f"stop_after_n_steps={steps}"]
        options = [part for each in sets for part in ("--set", each)]
        command = [sys.executable, "-m", "anchor_cli", "train", str(tmp_path / "spec.json"), *options]
        subprocess.run(command, check=True, capture_output=True)
    whole, resumed = (tmp_path / "runs" / name / "checkpoint-2" for name in ("whole", "resumed"))
    written = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(written) > 1
    for name in written:
        assert sha256_file(whole / name) == sha256_file(resumed / name), name
    assert sha256_file(whole / "model.safetensors") != sha256_file(folder / "model.safetensors")
    parity = export(resumed, out=tmp_path / "export").parity
    assert parity["passed"] and not parity["not_checked"]
    print(f"1 - cosine <= {1 - min(check['lowest_cosine'] for check in parity['checks']):.1e}")
