"""What `load_backbone` refuses: weights that are not there, and models whose attention is of another kind than ours."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from anchor_cli.base.errors import InputError
from anchor_cli.model import attention, backbone
from anchor_cli.model.attention import choose_kernel
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.packed import pack_texts
from anchor_cli.model.reconstruction import ReconstructionModel

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


def drop(folder: Path, *names: str) -> None:
    """Remove tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in names}, folder / "model.safetensors", {"format": "pt"})


def change(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_refused(model: Path) -> None:
    drop(model, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match="lacks 1 of the model's weights: model.layers.1.mlp.up_proj") as caught:
        load_backbone(model, dtype=torch.float32)
    assert str(model) in caught.value.message and caught.value.hint


def test_an_output_layer_may_lack_where_it_is_tied_or_not_used(model: Path) -> None:
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    load_backbone(model, dtype=torch.float32, reconstructs=True)
    change(model, tie_word_embeddings=False)
    load_backbone(model, dtype=torch.float32)  # for embeddings alone
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights: lm_head.weight"):
        load_backbone(model, dtype=torch.float32, reconstructs=True)


def test_a_damaged_file_and_another_config_are_told_in_words(model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="could not be loaded") as caught:
        load_backbone(model, dtype=torch.float32)
    assert str(model) in caught.value.message and "again" in str(caught.value.hint)
    weights.write_bytes(whole)
    change(model, intermediate_size=48)
    with pytest.raises(InputError, match="could not be loaded") as caught:
        load_backbone(model, dtype=torch.float32)
    assert "do not fit together" in str(caught.value.hint)


# -- attention ---------------------------------------------------------------------------------------------------------


def gemma(folder: Path, **keys: object) -> Path:
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**SIZES, **keys)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of 12 tokens on every layer."""
    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def test_soft_capped_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(gemma2\) has soft-capped attention scores") as error:
        load_backbone(gemma(tmp_path), dtype=torch.float32)
    assert "Qwen3" in str(error.value.hint)
    with pytest.raises(InputError, match="soft-capped logits"):
        load_backbone(gemma(tmp_path / "b", attn_logit_softcapping=None), dtype=torch.float32, reconstructs=True)


def test_other_layers_and_both_directions_are_refused(model: Path) -> None:
    change(model, is_causal=False)
    with pytest.raises(InputError, match="attention in both directions"):
        load_backbone(model, dtype=torch.float32)


def test_a_window_that_no_text_reaches_changes_nothing(mistral: Path) -> None:
    """Texts of 12 tokens and fewer: as transformers' own attention, one text at a time."""
    ours = ReconstructionModel(load_backbone(mistral, dtype=torch.float32, max_seq_length=12), kernel="sdpa")
    theirs = MistralForCausalLM.from_pretrained(mistral, attn_implementation="eager").model
    texts = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (12, 3, 7)]
    with torch.no_grad():
        got = ours.encode(pack_texts([text.astype("int32") for text in texts]))
        want = torch.stack([theirs(torch.tensor(text)[None]).last_hidden_state[0, -1] for text in texts])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_window_shorter_than_the_texts_is_refused_before_and_at_the_first_such_text(mistral: Path) -> None:
    with pytest.raises(InputError, match="max_seq_length: 13, but .* sliding window of 12 tokens only"):
        load_backbone(mistral, dtype=torch.float32, max_seq_length=13)
    model = ReconstructionModel(load_backbone(mistral, dtype=torch.float32), kernel="sdpa")  # nobody knows the texts
    long = torch.arange(2, 15).numpy().astype("int32")
    with pytest.raises(InputError, match="a text of 13 tokens is longer than the model's sliding window of 12"):
        model.encode(pack_texts([long]))


def test_qwen3_names_a_window_that_it_does_not_use(model: Path) -> None:
    change(model, sliding_window=8, use_sliding_window=False)
    load_backbone(model, dtype=torch.float32, max_seq_length=512, reconstructs=True)


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that passes for an H100, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    attention._works.cache_clear()
    yield torch.device("cuda")
    attention._works.cache_clear()
    sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error')", "undefined symbol"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart"),
        ("", "no flash_attn_varlen_func"),
    ],
)
@pytest.mark.parametrize("wish", ["auto", "flash_attention_2"])
def test_a_flash_package_that_cannot_be_used_is_passed_over(
    hopper: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    source: str, reason: str, wish: str,
) -> None:  # fmt: skip
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        assert choose_kernel(wish, hopper, torch.bfloat16) == "varlen"
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("flash_attn is installed and cannot be used") == 1 and reason in said


def test_a_flash_package_that_works_is_taken(
    hopper: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("def flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_kernel("auto", hopper, torch.bfloat16) == "flash_attention_2"


def test_liger_fits_the_models_it_is_applied_to(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_liger", lambda: print)
    assert backbone.liger_fits(model)
    change(model, model_type="olmo3")
    assert not backbone.liger_fits(model) and not backbone.liger_fits(tmp_path)
    monkeypatch.undo()
    if backbone._liger() is None:
        change(model, model_type="qwen3")
        assert not backbone.liger_fits(model)


@pytest.mark.parametrize(("name", "key"), [("gpt2", "resid_pdrop"), ("opt", "dropout"), ("llama", "attention_dropout")])
def test_dropout_is_refused_in_both_stages(name: str, key: str, tmp_path: Path) -> None:
    """No loss would be exact, nor a run continued: the key is named, and 0 is taken."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    from anchor_cli.train.stages.contrast import Contrast
    from anchor_cli.train.stages.reconstruct import Reconstruction

    model = SimpleNamespace(config=AutoConfig.for_model(name, **{key: 0.1}))
    for stage in (Reconstruction, Contrast):
        objective = stage.__new__(stage)
        objective._spec = SimpleNamespace(model_name_or_path="the/model")
        with pytest.raises(InputError, match=f"the/model: its config.json has {key} 0.1|has .*pdrop 0.1"):
            objective.module(model, "sdpa", "eos_token")
