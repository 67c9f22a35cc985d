"""One text contract from data to checkpoint to export: every command refuses another one and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_fixtures import make_checkpoint, make_contract

from anchor_cli.data.text import load_tokenizer
from anchor_cli.engine import checkpoint as ckpt
from anchor_cli.engine import setup
from anchor_cli.engine.embedder import contract_of, load_embedder
from anchor_cli.engine.export_tokenizer import write_tokenizer
from anchor_cli.words.contract import read_contract, write_contract
from anchor_cli.words.errors import InputError
from anchor_cli.words.spec import RunSpec


def spec_of(model: Path, **changes: Any) -> RunSpec:
    return RunSpec(model_name_or_path=str(model), dataset_file_path="pairs", **changes)


def test_a_run_may_begin_from_a_checkpoint_of_the_same_contract(small_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    assert setup.contract_for(spec_of(checkpoint, max_seq_length=96)).max_seq_length == 96, "length is free"


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
        setup.contract_for(spec_of(checkpoint, **changes))
    assert "was trained under another text contract" in caught.value.message and said in caught.value.message
    assert "put the first value into the spec" in (caught.value.hint or "")
    assert setup.contract_for(spec_of(small_model, **changes)), "a model without anchor.json promises nothing"


def test_a_changed_tokenizer_is_refused_by_training_and_by_evaluation(small_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFKC"}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    for action in (lambda: setup.contract_for(spec_of(checkpoint)), lambda: load_embedder(checkpoint)):
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
    assert setup.contract_for(spec_of(export)).tokenizer_fingerprint == contract.tokenizer_fingerprint
    ckpt.copy_tokenizer(str(export), run)
    assert (run / "tokenizer.json").read_bytes() == (small_model / "tokenizer.json").read_bytes()
