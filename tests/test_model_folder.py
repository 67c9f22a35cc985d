"""config.json of checkpoints and exports says in transformers 4's names what it says in those of transformers 5.

The slow test lets the oldest stack that docs/export.md names read exports, in an environment of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from export_fixtures import make_contract
from transformers import AutoConfig, AutoModelForCausalLM

from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.export import certificate_texts, readers
from anchor_cli.export import export as exporting
from anchor_cli.export.certify import CertifiedTexts
from anchor_cli.export.export import export
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.folder import older_fields, read_config, save_model

OLDEST_STACK = (
    "transformers==4.51.3 sentence-transformers==3.4.1 tokenizers==0.21.1 huggingface_hub==0.30.2 "
    "datasets==3.5.1 fsspec==2025.3.0 dill==0.3.8 multiprocess==0.70.16"
).split()
NEEDED_BY_IT = ["aiohttp"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500_000.0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "head_dim": 8},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1_000_000.0}},
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}, "sliding_window": None},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}},
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
}  # fmt: skip


def config_of(name: str, **more: Any) -> Any:
    return AutoConfig.for_model(name, **(SIZES | MODELS.get(name, {}) | more))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("qwen3", {"rope_theta": 1_000_000.0, "rope_scaling": None}),
        ("llama", {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
        ("qwen2", {"rope_theta": 1_000_000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("phi3", {"rope_theta": 20_000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rotary_emb_base": 25_000.0, "rotary_pct": 0.5, "rope_scaling": None}),
    ],
)
def test_rotary_parameters_have_the_older_names(name: str, want: dict[str, Any]) -> None:
    config = config_of(name)
    assert older_fields(type(config), config.to_dict() | {"dtype": "bfloat16"}) == want | {"torch_dtype": "bfloat16"}


def test_layers_of_two_kinds_have_the_older_names() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
    }
    config = config_of("gemma3_text", rope_parameters=rope, num_hidden_layers=12, sliding_window=512)
    assert older_fields(type(config), config.to_dict()) == {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 20_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }


def test_what_has_no_older_name_is_not_written() -> None:
    """Another base on the layers of a window: no name of transformers 4 says it for this model."""
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in
            (("full_attention", 500_000.0), ("sliding_attention", 10_000.0))}  # fmt: skip
    config = config_of("olmo3", rope_parameters=rope, num_hidden_layers=4, sliding_window=64)
    assert "rope_theta" not in older_fields(type(config), config.to_dict())


@pytest.mark.parametrize("name", [*MODELS, "gemma3_text"])
def test_a_saved_config_reads_as_before(name: str, small_model: Path, tmp_path: Path) -> None:
    config = config_of(name, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    save_model(tmp_path, model, make_contract(small_model))
    written = read_config(tmp_path)
    assert written["torch_dtype"] == written["dtype"] == "float32" and "rope_scaling" in written
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters
    assert getattr(read, "layer_types", None) == getattr(config, "layer_types", None)


# -- the oldest stack --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oldest_stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the oldest libraries named in docs/export.md, and of this environment whatever else they need."""
    home = tmp_path_factory.mktemp("oldest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for more in (["--no-deps", *OLDEST_STACK], NEEDED_BY_IT):
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *more],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")
    (folder,) = (home / "lib").glob("python3.*/site-packages")
    (folder / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # torch, numpy: behind its own
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_oldest_stack_reads_exports_as_we_do(
    name: str, small_model: Path, oldest_stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate_texts, "ODD", certificate_texts.ODD[::4])
    monkeypatch.setattr(certificate_texts, "SENTENCES", {"ko": certificate_texts.SENTENCES["ko"][1:]})
    vocabulary = read_config(small_model)
    source = tmp_path / "model"
    AutoModelForCausalLM.from_config(
        config_of(name, vocab_size=vocabulary["vocab_size"], eos_token_id=vocabulary["eos_token_id"])
    ).save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((small_model / file).read_bytes())
    passed = {"passed": True, "num_texts": 1, "not_checked": [], "checks": [{"against": "us", "lowest_cosine": 1.0}]}
    monkeypatch.setattr(exporting, "certify", lambda *_, **__: passed)
    folder = export(source, out=tmp_path / "export").folder

    texts = CertifiedTexts(folder)
    (tmp_path / "texts.json").write_text(json.dumps(texts.for_readers()))
    script = Path(importlib.import_module(readers.__name__).__file__ or "")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [oldest_stack, script, folder, tmp_path / "texts.json", tmp_path / "out.json"], env=environment, check=True
    )
    ours = texts.by_anchor(folder)
    readings = json.loads((tmp_path / "out.json").read_text())
    assert readings.pop("versions") == {"transformers": "4.51.3", "sentence-transformers": "3.4.1"}
    for library, each in readings.items():
        for reading in each:
            comparison = texts.compare_reading(library, ours, reading)
            assert comparison.passed, comparison.reason
    assert sorted(readings) == ["sentence-transformers", "transformers"]


def test_rotary_parameters_matter_to_these_texts(small_model: Path, tmp_path: Path) -> None:
    """The comparison above can fail: with transformers 4's default base of 10,000 vectors differ."""
    import numpy as np
    import torch

    model = load_backbone(small_model, dtype=torch.float32)
    save_model(tmp_path, model, make_contract(small_model))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((small_model / file).read_bytes())
    before = CertifiedTexts(tmp_path).by_anchor(tmp_path).vectors
    config = read_config(tmp_path)
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10_000.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    after = CertifiedTexts(tmp_path).by_anchor(tmp_path).vectors
    assert load_embedder(tmp_path) is not None
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosine.min() < 0.999
