"""Fixtures of every test: the shared data where it is, a small model that needs nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("ANCHOR_SHARED", REPOSITORY.parent / "shared"))

# Before torch is imported by any test: two cores are shared by everything, and one thread is fastest for tiny models.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for the network
if shutil.which("nvidia-smi") is None:  # without a card Triton's kernels are interpreted; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

SENTENCES = [
    "주어진 질문에 대해 관련 문서를 검색하세요",
    "Retrieve relevant documents for the given query",
    "수달은 강과 바다에 사는 동물이다. 수달은 어디에 사나요?",
    "Otters live in rivers and in the sea. Where do otters live?",
    "복지 급여는 주민센터에서 신청할 수 있다",
    "You can apply for the benefit at the community centre",
    "user\n",
]


@pytest.fixture(scope="session", autouse=True)
def _home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of tests are not remembered among this user's."""
    os.environ["ANCHOR_HOME"] = str(tmp_path_factory.mktemp("anchor-home"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: tokenizer, pairs, BEIR folders."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED} (set ANCHOR_SHARED)")
    return SHARED / "data"


def save_random_qwen3(folder: Path, *, vocab_size: int, eos_token_id: int, hidden: int, layers: int) -> Path:
    """A Qwen3 with random float32 weights, seed 0, as a Hugging Face folder without a tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        max_window_layers=layers,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=None,  # as in the real config; a pad row would start as zeros and make gradients explode
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random Qwen3 (hidden 32, 2 layers) with a tokenizer of Qwen's form, some 600 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    eos = tokenizer.token_to_id("<|im_end|>")
    folder = save_random_qwen3(
        tmp_path_factory.mktemp("models") / "small-qwen3",
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=eos,
        hidden=32,
        layers=2,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random Qwen3 (hidden 32, 2 layers) with the real vocabulary of Qwen3 (151,936 rows)."""
    folder = save_random_qwen3(
        tmp_path_factory.mktemp("models") / "tiny-qwen3", vocab_size=151936, eos_token_id=151645, hidden=32, layers=2
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "tokenizer" / name, folder / name)
    return folder
