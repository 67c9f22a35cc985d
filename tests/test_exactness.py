"""Models that packing or the loss would compute otherwise are refused in words; the others equal the stock model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import make_contract
from stock_reference import our_results, save_random_model, stock_results
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoConfig

from anchor_cli.base.contract import write_contract
from anchor_cli.base.errors import InputError
from anchor_cli.cli import run as anchor
from anchor_cli.data.tokenizer_fit import require_exportable
from anchor_cli.data.training_set import contract_for
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.export.export import export
from anchor_cli.model import backbone, exactness
from anchor_cli.model.backbone import checkpoint_activations, load_backbone, refuse_configuration
from anchor_cli.model.exactness import logit_scale, shrunk_config, try_configuration
from anchor_cli.model.pooling import prune_last_layer
from anchor_cli.spec.load import load_spec

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TOKENS = {"vocab_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}


def config_of(name: str, **more: Any) -> Any:
    """A small configuration: of the usual names where they are passed, else the kind's own, shrunk."""
    if not more:
        return shrunk_config(AutoConfig.for_model(name), narrow=True)
    return AutoConfig.for_model(name, **(TOKENS | more))


# -- texts packed beside each other ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "beside other texts differ"),  # ALiBi from a mask
        ("gpt_neox_japanese", "beside other texts differ"),
        ("rwkv", "beside other texts differ"),  # recurrence
        ("jamba", "beside other texts differ|layers of"),  # a convolution
        ("openai-gpt", "beside other texts differ"),
        ("xlnet", "beside other texts differ"),
        ("stablelm", "do not pass text boundaries"),
        ("nemotron", "do not pass text boundaries"),
        ("gptj", "takes no attention function but its own"),
    ],
)
def test_models_whose_packed_texts_would_leak_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        refuse_configuration(AutoConfig.for_model(name), "the/model")
    assert "the/model" in caught.value.message and name in caught.value.message and "Qwen3" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "prunes"),
    [("qwen2", True), ("olmo2", False), ("gpt2", False), ("opt", False), ("phi3", True), ("mixtral", True),
     ("starcoder2", True), ("gemma3_text", True), ("cohere", True)],
)  # fmt: skip
def test_models_of_other_makes_equal_the_stock_model(name: str, prunes: bool, tmp_path: Path) -> None:
    """And, where the class allows it, also with the last layer computed in pooled rows only."""
    folder = save_random_model(tmp_path, config_of(name))
    want, want_loss = stock_results(folder)
    model = load_backbone(folder, dtype=torch.float32, reconstructs=True)
    assert getattr(model, backbone.CAN_PRUNE) == prunes
    for pruned in {False, prunes}:
        if pruned:
            prune_last_layer(model)
        got, loss = our_results(model)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert loss == pytest.approx(want_loss, rel=1e-5)


def test_a_leak_of_a_model_that_no_small_one_stands_for_is_found_in_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_random_model(tmp_path / "bloom", config_of("bloom"))
    fine = save_random_model(tmp_path / "llama", config_of("llama", **WIDTHS, **HEADS))
    monkeypatch.setattr(exactness, "_random_model", lambda config: 1 / 0)
    monkeypatch.setattr(exactness, "_trials", {})
    with pytest.raises(InputError, match="beside other texts differ"):
        load_backbone(folder, dtype=torch.float32)
    load_backbone(fine, dtype=torch.float32, reconstructs=True)
    load_backbone(fine, dtype=torch.bfloat16, reconstructs=True)


def test_a_trial_that_shows_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose last state depends on nothing before it would pass whatever leaked."""
    monkeypatch.setattr(exactness, "_trials", {})
    monkeypatch.setattr(exactness, "stock_states", lambda model, texts=None: [torch.ones(4, 8)] * 3)
    assert not try_configuration(config_of("llama", **WIDTHS, **HEADS)).was_tried


def test_rotary_embeddings_that_depend_on_the_longest_text_of_a_pack_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = config_of("llama", **WIDTHS, **HEADS, rope_parameters=rope, max_position_embeddings=128)
    refuse_configuration(config, "model", max_seq_length=128)
    with pytest.raises(InputError, match=r"max_seq_length: 129, but 'model' \(dynamic rotary") as caught:
        refuse_configuration(config, "model", max_seq_length=129)
    assert "128 or less" in str(caught.value.hint)


# -- output layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "want"),
    [
        ("llama", {}, 1.0),
        ("granite", {"logits_scaling": 6.0}, 1 / 6),
        ("granitemoe", {"logits_scaling": 16.0, "num_local_experts": 2, "num_experts_per_tok": 1}, 1 / 16),
        ("hyperclovax", {"logits_scaling": 4.0}, 4.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625),
        ("cohere2", {"logit_scale": 0.3}, 0.3),
    ],
)
def test_scaled_logits_are_computed(name: str, keys: dict[str, Any], want: float, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, config_of(name, **WIDTHS, **HEADS, **keys))
    model = load_backbone(folder, dtype=torch.float32, reconstructs=True)
    assert logit_scale(model) == pytest.approx(want, rel=1e-6) and (want != 1.0 or logit_scale(model) == 1.0)
    (states, want_loss), (got, loss) = stock_results(folder), our_results(model)
    torch.testing.assert_close(got, states, rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    half = load_backbone(folder, dtype=torch.bfloat16, reconstructs=True)
    assert logit_scale(half) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "part"),
    [("phi", "a bias"), ("ctrl", "a bias"), ("gemma3_text", "soft-capped logits"), ("biogpt", None)],
)
def test_output_layers_of_other_kinds_are_refused_where_they_are_used(name: str, part: str | None) -> None:
    config = AutoConfig.for_model(name, **({"final_logit_softcapping": 30.0} if name == "gemma3_text" else {}))
    refuse_configuration(config, "model")  # for embeddings alone
    if part is None:
        refuse_configuration(config, "model", reconstructs=True)
    else:
        with pytest.raises(InputError, match=part):
            refuse_configuration(config, "model", reconstructs=True)


def test_a_nonlinear_output_layer_is_found_by_its_numbers(tmp_path: Path) -> None:
    model = load_backbone(save_random_model(tmp_path, config_of("llama", **WIDTHS, **HEADS)), dtype=torch.float32)
    stock = model.lm_head.forward
    for other in (lambda h: 30 * torch.tanh(stock(h) / 30), lambda h: stock(h) + 0.1, lambda h: stock(h)[..., :-1]):
        model.lm_head.forward = other
        with pytest.raises(InputError, match="not a multiple|logits of 63 classes"):
            logit_scale(model)
    model.lm_head.forward = stock
    assert logit_scale(model) == 1.0 and not hasattr(model.get_decoder(), "forward.__self__")


# -- cost and side effects ---------------------------------------------------------------------------------------------


def test_a_trial_leaves_random_numbers_alone_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "_trials", {})
    before = torch.get_rng_state()
    config = config_of("llama", **WIDTHS, **HEADS)
    assert try_configuration(config).was_tried
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(exactness, "_try", lambda config: 1 / 0)
    try_configuration(config)


def test_recomputing_layers_warns_of_nothing_and_keeps_random_state_only_for_dropout(tmp_path: Path) -> None:
    kept = {}
    for name, more in (("llama", {}), ("gpt2", {"resid_pdrop": 0.1})):
        config = config_of(name, **({"n_embd": 32, "n_layer": 1, "n_head": 2} if more else WIDTHS | HEADS), **more)
        model = load_backbone(save_random_model(tmp_path / name, config), dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint_activations(model)
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        options = next(m for m in layers if hasattr(m, "_gradient_checkpointing_func"))._gradient_checkpointing_func
        assert options.keywords["use_reentrant"] is False
        kept[name] = options.keywords["preserve_rng_state"]
    assert kept == {"llama": False, "gpt2": True}


# -- every command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stablelm(small_model: Path, tmp_path: Path) -> Path:
    """A whole model folder of a kind that leaks."""
    config = config_of("stablelm")
    config.vocab_size = json.loads((small_model / "config.json").read_text())["vocab_size"]
    folder = save_random_model(tmp_path / "stablelm", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, folder)
    return folder


def write_spec(folder: Path, model: Path) -> Path:
    rows = [json.dumps({"anchor": f"질문 {i}", "positive": f"answer {i}"}, ensure_ascii=False) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    spec = {
        "model_name_or_path": str(model), "dataset_file_path": str(folder / "rows.jsonl"), "experiment_id": "e",
        "output_dir": str(folder / "out"), "global_batch_size": 4, "max_steps": 2, "warmup_steps": 1, "save_steps": 0,
        "precision": "float32", "max_seq_length": 64,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(spec))
    return folder / "run.json"


def test_eval_export_and_plan_refuse_alike(stablelm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export"
    for refused in (lambda: load_embedder(stablelm, dtype="float32"), lambda: export(stablelm, out=out)):
        with pytest.raises(InputError, match="cannot be run without padding"):
            refused()
    assert not out.exists()
    anchor(["plan", str(write_spec(tmp_path, stablelm))])
    assert "cannot be run without padding" in capsys.readouterr().out


# -- tokenizers --------------------------------------------------------------------------------------------------------


def with_tokenizer(model: Path, folder: Path, change: Any) -> Path:
    """A copy of `model` with its tokenizer changed."""
    shutil.copytree(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "token",
    [AddedToken("<|mine|>", special=True), AddedToken("낱말", special=False), AddedToken("[PAD]", special=True)],
)
def test_token_ids_beyond_the_embedding_are_refused_at_the_start(
    token: AddedToken, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_tokenizer(small_model, tmp_path / "model", lambda tokenizer: tokenizer.add_tokens([token]))
    says = f"its tokenizer has token '{token.content}' with id"
    with pytest.raises(InputError, match=r"and its embedding has \d+ rows") as caught:
        load_embedder(model, dtype="float32")
    assert says.replace("'", "") in caught.value.message.replace("'", "") and "resize" in str(caught.value.hint)
    spec = write_spec(tmp_path, model)
    assert anchor(["plan", str(spec)]) in (0, 2)
    captured = capsys.readouterr()
    assert says in captured.out + captured.err
    with pytest.raises(InputError, match=r"and its embedding has \d+ rows"):  # what training begins with
        contract_for(load_spec(spec, []))


def test_tokenizers_that_can_never_be_exported_are_refused_before_training(small_model: Path, tmp_path: Path) -> None:
    for number, (steps, says) in enumerate(
        (
            (normalizers.Prepend("▁"), "Prepend puts '▁' before every piece"),
            (normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")]), "Prepend puts '_'"),
            (normalizers.Sequence([normalizers.Sequence([normalizers.Strip()])]), "Strip strips every piece"),
        )
    ):
        folder = tmp_path / str(number)
        model = with_tokenizer(
            small_model, folder, lambda tokenizer, steps=steps: setattr(tokenizer, "normalizer", steps)
        )
        with pytest.raises(InputError, match=says):
            require_exportable(Tokenizer.from_file(str(model / "tokenizer.json")), model)
    require_exportable(Tokenizer.from_file(str(small_model / "tokenizer.json")), small_model)


def test_a_contract_beside_the_model_changes_nothing_of_it(stablelm: Path, small_model: Path) -> None:
    write_contract(stablelm, make_contract(small_model))
    with pytest.raises(InputError, match="cannot be run without padding"):
        load_embedder(stablelm, dtype="float32")


def test_a_plan_remembers_a_configuration_that_passed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second plan of it imports no torch; another configuration, or one refused before, is tried."""
    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    spec = write_spec(tmp_path, small_model)
    calls: list[str] = []
    real = backbone.refuse_configuration

    def counted(config: Any, source: str, **options: Any) -> Any:
        calls.append(source)
        return real(config, source, **options)

    monkeypatch.setattr(backbone, "refuse_configuration", counted)
    for _ in range(2):
        anchor(["plan", str(spec)])
    assert calls == [str(small_model)]
    other = shutil.copytree(small_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 30.0}))
    spec = write_spec(tmp_path, other)
    for _ in range(2):
        capsys.readouterr()
        anchor(["plan", str(spec)])
        assert "soft-capped attention scores" in capsys.readouterr().out
    assert calls == [str(small_model), str(other), str(other)]
