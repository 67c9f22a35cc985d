"""The peer of the benchmarks optimises the same objective: its padded losses against one pair at a time, unpadded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

ROWS = [
    ("수달은 어디에 사나요?", "수달은 강과 바다에 사는 동물이다."),
    ("Where?", "Otters live in rivers and in the sea. " * 6),
    ("복지 급여는", "a"),
]
LONGEST = 60  # the second document is truncated


@pytest.fixture(scope="module")
def padded(small_model: Path) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "padded_baseline.py"
    loaded = importlib.util.spec_from_file_location("padded_baseline", path)
    assert loaded is not None and loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    import sys

    sys.modules["padded_baseline"] = module
    loaded.loader.exec_module(module)
    module.EOS_ID = _tokenizer(small_model).token_to_id("<|im_end|>")  # type: ignore[attr-defined]
    return module


def _tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def naive_losses(model: torch.nn.Module, folder: Path, eos: int) -> tuple[float, float]:
    """D2Q and Q2D, one pair at a time without a mask: sums over target tokens, divided once."""
    tokenizer, sums, counts = _tokenizer(folder), [0.0, 0.0], [0, 0]
    instruction = "주어진 질문에 대해 관련 문서를 검색하세요; "
    for query, document in ROWS:
        sides = []
        for text in (instruction + query, document):
            ids = tokenizer.encode(f"<|im_start|>user\n{text.strip()}<|im_end|>", add_special_tokens=False).ids
            sides.append(torch.tensor(ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], eos]))
        embed = model.get_input_embeddings()  # type: ignore[operator]
        states = [model.model(input_ids=ids[None]).last_hidden_state[0, -1] for ids in sides]  # type: ignore[operator]
        for side, ids in enumerate(sides):
            inputs = torch.cat([states[1 - side][None], embed(ids[:-2])])
            logits = model(inputs_embeds=inputs[None]).logits[0]
            sums[side] += float(F.cross_entropy(logits, ids[:-1], reduction="sum"))
            counts[side] += len(ids) - 1
    return sums[0] / counts[0], sums[1] / counts[1]


def test_losses_equal_a_loop_without_padding(padded: ModuleType, small_model: Path) -> None:
    trainer = padded.PaddedTrainer(small_model, max_seq_length=LONGEST)
    with torch.no_grad():
        got = [float(loss) for loss in trainer.losses(ROWS)]
        want = naive_losses(trainer.model, small_model, padded.EOS_ID)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_step_learns(padded: ModuleType, small_model: Path) -> None:
    trainer = padded.PaddedTrainer(small_model, max_seq_length=LONGEST, learning_rate=1e-2)
    losses = [trainer.step(ROWS) for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]


def test_content_mask_by_text(padded: ModuleType, small_model: Path) -> None:
    trainer = padded.PaddedTrainer(small_model, max_seq_length=LONGEST)
    query, document = trainer.collate(ROWS)
    content = document.input_ids[2][document.content[2]]
    assert trainer.collate.tokenizer.decode(content) == "a"
    assert query.attention_mask[:, -1].all() and not query.content[:, -1].any()
    assert (query.input_ids[:, -1] == padded.EOS_ID).all()


def test_it_imports_nothing_of_ours() -> None:
    text = (Path(__file__).parents[1] / "benchmarks" / "padded_baseline.py").read_text()
    assert "import anchor_cli" not in text and "from anchor_cli" not in text
