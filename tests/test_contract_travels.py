"""One text contract from data to checkpoint to export: every command refuses another one and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_fixtures import make_checkpoint, make_contract

from anchor_cli.base.contract import read_contract, write_contract
from anchor_cli.base.errors import InputError
from anchor_cli.data.text import load_tokenizer, tokenizer_fingerprint
from anchor_cli.data.training_set import contract_for
from anchor_cli.evaluate.embedder import contract_of, load_embedder
from anchor_cli.export.files import prompts
from anchor_cli.export.tokenizer import write_tokenizer
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train import saving as ckpt


def spec_of(model: Path, **changes: Any) -> RunSpec:
    return RunSpec(model_name_or_path=str(model), dataset_file_path="pairs", **changes)


def test_a_run_may_begin_from_a_checkpoint_of_the_same_contract(small_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    assert contract_for(spec_of(checkpoint, max_seq_length=96)).max_seq_length == 96, "length is free"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling_mode": "mean"}, "pooling_mode: 'eos_token' != 'mean'"),
        ({"text_template": "{text}<|im_end|>"}, "text_template"),
    ],
)
def test_a_run_that_treats_texts_otherwise_than_its_model_is_refused(
    changes: dict[str, Any], said: str, small_model: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    with pytest.raises(InputError) as caught:
        contract_for(spec_of(checkpoint, **changes))
    assert "was trained under another text contract" in caught.value.message and said in caught.value.message
    assert "put the first value into the spec" in (caught.value.hint or "")
    assert contract_for(spec_of(small_model, **changes)), "a model without anchor.json promises nothing"


def test_a_changed_tokenizer_is_refused_by_training_and_by_evaluation(small_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFKC"}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    for action in (lambda: contract_for(spec_of(checkpoint)), lambda: load_embedder(checkpoint)):
        with pytest.raises(InputError) as caught:
            action()
        assert "tokenizer" in caught.value.message and "tokenizer.json" in (caught.value.hint or "")


def test_a_contract_that_does_not_agree_with_itself_is_refused(small_model: Path, tmp_path: Path) -> None:
    write_contract(tmp_path, make_contract(small_model, eos_token_id=1))
    with pytest.raises(InputError, match=r"with id 1 is not what closes its text_template"):
        contract_of(tmp_path, load_tokenizer(small_model))


def test_an_export_is_under_the_contract_of_its_checkpoint(small_model: Path, tmp_path: Path) -> None:
    """Its tokenizer.json closes texts for other tools; ours and a run that begins from it use the untouched one."""
    contract = make_contract(small_model)
    export, run = tmp_path / "export", tmp_path / "next"
    export.mkdir()
    run.mkdir()
    write_tokenizer(small_model, export, contract)
    write_contract(export, contract)
    assert contract_of(export, load_tokenizer(export)) == read_contract(export) == contract
    assert contract_for(spec_of(export)).tokenizer_fingerprint == contract.tokenizer_fingerprint
    ckpt.copy_tokenizer(str(export), run)
    assert (run / "tokenizer.json").read_bytes() == (small_model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dtype": "float16"}, "dtype float16, and anchor.json says float32"),
        ({"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    config: dict[str, Any], said: str, small_model: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model, dtype="float32"))
    assert contract_of(checkpoint, load_tokenizer(checkpoint)).dtype == "float32"
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=said):
        contract_of(checkpoint, load_tokenizer(checkpoint))


def test_one_instruction_for_all_is_that_of_every_prompt(small_model: Path) -> None:
    """`*` replaces the built-in instructions in evaluation and export, as it does in training."""
    spec = spec_of(small_model, instructions={"*": "찾기"})
    contract = contract_for(spec)
    assert contract.instructions == contract.training_instructions == {"*": "찾기"}
    want = "<|im_start|>user\n찾기; "
    assert {key: value for key, value in prompts(contract).items() if key != "document"} == dict.fromkeys(
        ("query", "query_ko", "query_en"), want
    )


def test_an_empty_instruction_is_none(small_model: Path) -> None:
    contract = make_contract(small_model, training_instructions={"*": ""}, instructions={"ko": "", "en": "Find"})
    head = "<|im_start|>user\n"
    want = {"query": head, "document": head, "query_ko": head, "query_en": f"{head}Find; "}
    assert prompts(contract) == want


def test_the_tokenizer_of_a_hub_model_is_copied_as_it_is(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen publishes `trim_offsets: false`; what transformers writes anew says true, and the ids are the same."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    from transformers import AutoTokenizer

    hub, run, resaved = tmp_path / "hub", tmp_path / "run", tmp_path / "resaved"
    for folder in (hub, run):
        folder.mkdir()
    tokenizer = json.loads((small_model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["trim_offsets"] = False
    (hub / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    config = json.loads((small_model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (hub / "tokenizer_config.json").write_text(json.dumps(config))

    def download(repo: str, name: str, **_: Any) -> str:
        if not (hub / name).is_file():
            raise EntryNotFoundError(f"{repo} has no {name}")
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ckpt.copy_tokenizer("me/published", run)
    assert sorted(path.name for path in run.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (run / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    want = tokenizer_fingerprint(load_tokenizer("me/published"))
    assert tokenizer_fingerprint(load_tokenizer(run)) == want
    AutoTokenizer.from_pretrained(small_model).save_pretrained(resaved)
    assert tokenizer_fingerprint(load_tokenizer(resaved)) == want == tokenizer_fingerprint(load_tokenizer(small_model))


@pytest.mark.parametrize(
    ("name", "problem"), [("anchor.json", "anchor.json is missing"), ("model.safetensors", "bytes")]
)
def test_a_start_checkpoint_that_lacks_a_file_or_has_one_cut_short_is_refused(
    name: str, problem: str, small_model: Path, tmp_path: Path
) -> None:
    """Copied in part, or while it was being written."""
    path = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model)) / name
    content = path.read_bytes()
    path.unlink()
    if name != "anchor.json":
        path.write_bytes(content[:-8])
    with pytest.raises(InputError, match=f"checkpoint-1: not a whole checkpoint: {name}.*{problem.split()[-1]}"):
        contract_for(spec_of(path.parent))
