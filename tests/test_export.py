"""`anchor export`: what is written, what is certified, and what is refused with nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fixtures import log_scores, make_checkpoint, make_contract, random_texts

from anchor_cli.base.contract import write_llm2vec_config
from anchor_cli.base.errors import InputError, RunError
from anchor_cli.base.files import staged_folder, sweep_staged, this_host
from anchor_cli.base.runs import remember_run
from anchor_cli.cli import run as anchor
from anchor_cli.data.text import load_tokenizer
from anchor_cli.evaluate.embedder import PackedEmbedder, contract_of, load_embedder
from anchor_cli.export import certificate_texts, readers
from anchor_cli.export import certify as certificate
from anchor_cli.export import export as exporting
from anchor_cli.export import files as export_files
from anchor_cli.export.certify import Encoded, compare, compare_all
from anchor_cli.export.export import Export, export

REPOSITORY = Path(__file__).parents[1]
PASSED = {
    "passed": True,
    "num_texts": 1,
    "num_truncated": 0,
    "not_checked": [],
    "checks": [{"against": "transformers", "lowest_cosine": 1.0}],
}


@pytest.fixture(scope="module")
def run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2 and 4, of which 2 scored higher."""
    folder = tmp_path_factory.mktemp("output") / "kure"
    folder.mkdir()
    for step in (2, 4):
        make_checkpoint(folder, step, small_model, make_contract(small_model))
    log_scores(folder, {2: 0.5, 4: 0.4})
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Export:
    """One export with its real certificate, made in a fresh process."""
    return export(run / "checkpoint-2", out=run / "export")


@pytest.fixture
def uncertified(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what happens around the certificate."""
    monkeypatch.setattr(exporting, "certify", lambda folder, checkpoint, **_: dict(PASSED))


@pytest.fixture
def certified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real certificate on a third of the texts, without the cost of a fresh process."""
    monkeypatch.setattr(certificate_texts, "ODD", certificate_texts.ODD[::4])
    monkeypatch.setattr(certificate_texts, "SENTENCES", {"ko": certificate_texts.SENTENCES["ko"][1:]})
    monkeypatch.setattr(readers, "BATCH_SIZES", ((1, "left"), (32, "right")))

    def certify(folder: Path, checkpoint: Path, *, converted: bool) -> dict[str, Any]:
        result = compare_all(folder, checkpoint, converted=converted)
        if not result["passed"]:
            raise RunError(result["failed"])
        return result

    monkeypatch.setattr(exporting, "certify", certify)


@contextlib.contextmanager
def nothing_left(run: Path) -> Iterator[None]:
    before = sorted(path.name for path in run.iterdir())
    yield
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_folder_is_whole_and_certified(exported: Export) -> None:
    names = {path.name for path in exported.folder.iterdir()}
    assert names == set(
        "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json base_tokenizer "
        "modules.json sentence_bert_config.json config_sentence_transformers.json 1_Pooling 2_Normalize "
        "llm2vec_config.json anchor.json spec.json scores.json stage_II.json parity.json README.md".split()
    )
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    undocumented = {name for name in names if name.replace("model.safe", "model*.safe") not in page}
    assert not undocumented
    parity = json.loads((exported.folder / "parity.json").read_text())
    assert parity["passed"] and parity["not_checked"] == [] and parity["num_truncated"] > 5
    ways = {(check["against"], check["batch_size"], check["padding_side"]) for check in parity["checks"]}
    for library in ("transformers", "sentence-transformers"):
        assert {(library, 1, "left"), (library, 32, "left"), (library, 32, "right")} <= ways
    assert all(check["num_other_ids"] == 0 and check["lowest_cosine"] > 1 - 1e-6 for check in parity["checks"])


def test_it_is_a_transformers_model(exported: Export, run: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    ids = torch.tensor([[1, 5, 9, 2]])
    ours = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(exported.folder)(ids).logits, ours)
    assert AutoModel.from_pretrained(exported.folder)(ids).last_hidden_state.shape == (1, 4, 32)
    assert json.loads((exported.folder / "config.json").read_text())["use_cache"] is True


def test_our_own_encoder_reads_it_as_ours(exported: Export, run: Path) -> None:
    ours, theirs = load_embedder(run / "checkpoint-2"), load_embedder(exported.folder)
    assert isinstance(theirs, PackedEmbedder)
    texts = random_texts(10, seed=5)
    assert np.array_equal(ours.encode_queries(texts, "ko"), theirs.encode_queries(texts, "ko"))
    assert np.array_equal(ours.encode_documents(texts, "en"), theirs.encode_documents(texts, "en"))


def test_sentence_transformers_finds_prompts_pooling_and_length(exported: Export) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported.folder), device="cpu")
    ours = load_embedder(exported.folder)
    texts = ["수달은 어디에 사나요?", "  Where do otters live?\n"]
    pairs = [
        (model.encode_query(texts), ours.encode_queries(texts, "ko")),
        (model.encode_query(texts, prompt_name="query_en"), ours.encode_queries(texts, "en")),
        (model.encode_document(texts), ours.encode_documents(texts, "ko")),
        (model.encode(texts), ours.encode_documents(texts, "ko")),
    ]
    for theirs, vectors in pairs:
        np.testing.assert_allclose(theirs, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6)
    assert model.max_seq_length == 48 and model.similarity_fn_name == "cosine"


def test_code_in_the_style_of_llm2vec_gets_our_vectors(exported: Export) -> None:
    """It sets the pad token, pads left, writes the whole template itself, and takes the last state."""
    from transformers import AutoModel, AutoTokenizer

    settings = json.loads((exported.folder / "llm2vec_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = ["수달은 강과 바다에 산다.", "a", "Otters live in rivers. " * 40]
    templated = [f"<|im_start|>user\n{text.strip()}<|im_end|>" for text in texts]
    batch = tokenizer(
        templated, return_tensors="pt", padding=True, truncation=True, max_length=settings["doc_max_length"]
    )
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(exported.folder)(**batch).last_hidden_state[:, -1].numpy()
    ours = load_embedder(exported.folder).encode_documents(texts, "ko")
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("mode", ["eos_token", "mean", "weighted_mean"])
def test_what_skip_instruction_means_to_llm2vec(mode: str, small_model: Path, tmp_path: Path) -> None:
    """LLM2Vec's pooling, written out: under `skip_instruction` it pools what stands behind the separator, with [EOS].

    Ours pools content without [EOS], so of the two means theirs has one state more; the state of [EOS] is the same.
    """
    from transformers import AutoModel, AutoTokenizer

    contract = make_contract(small_model, pooling_mode=mode, instructions={"ko": "find:\n"})
    checkpoint = make_checkpoint(tmp_path, 1, small_model, contract)
    write_llm2vec_config(checkpoint, contract)
    skips = json.loads((checkpoint / "llm2vec_config.json").read_text())["skip_instruction"]
    assert skips == (mode != "eos_token")
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    content = "수달은 어디에 사나요?"
    ids = tokenizer(f"<|im_start|>user\nfind:\n{content}<|im_end|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0]
    num_behind = len(tokenizer(f"{content}<|im_end|>")["input_ids"])  # their embed_mask
    pooled = states[-num_behind:] if skips else states
    weights = torch.arange(1, len(pooled) + 1) if mode == "weighted_mean" else torch.ones(len(pooled))
    theirs = states[-1] if mode == "eos_token" else (pooled * weights[:, None]).sum(0) / weights.sum()

    ours = torch.from_numpy(load_embedder(checkpoint).encode_queries([content], "ko")[0])
    if mode != "eos_token":  # put [EOS] back among the pooled states
        ours = (ours * weights[:-1].sum() + weights[-1] * states[-1]) / weights.sum()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_checkpoint_of_the_research_code_keeps_its_length(small_model: Path, tmp_path: Path) -> None:
    """Its folder has no anchor.json; without its llm2vec_config.json texts would be cut at 512 tokens, silently."""
    theirs = tmp_path / "checkpoint-14554"
    shutil.copytree(small_model, theirs)
    (theirs / "anchor.json").unlink(missing_ok=True)
    settings = {"pooling_mode": "eos_token", "max_length": 96, "doc_max_length": 400, "skip_instruction": True}
    (theirs / "llm2vec_config.json").write_text(json.dumps(settings))
    assert contract_of(theirs, load_tokenizer(theirs)).max_seq_length == 96
    (theirs / "llm2vec_config.json").write_text(json.dumps({**settings, "pooling_mode": "mean"}))
    with pytest.raises(InputError, match="pooling_mode mean of LLM2Vec"):
        load_embedder(theirs)


def test_the_code_of_the_model_card_gives_our_vectors(exported: Export) -> None:
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    ours = load_embedder(exported.folder)
    query = ours.encode_queries(["수달은 어디에 사나요?"], "ko")
    document = ours.encode_documents(["수달은 강과 바다에 산다."], "ko")
    want = np.concatenate([vectors / np.linalg.norm(vectors) for vectors in (query, document)])
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace(f'"{exported.folder.name}"', f'"{exported.folder}"'), names)
        got = names["embeddings"] if "embeddings" in names else np.concatenate([names["queries"], names["documents"]])
        np.testing.assert_allclose(np.asarray(got), want, atol=1e-6)


def test_the_model_card_says_where_it_comes_from(exported: Export) -> None:
    import yaml

    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other" and head["language"] == ["ko", "en"] and head["license_name"]
    for said in ("step | 2 of 10", "pairs a step | 8", "KoEnQP", "ko/NanoNQ | 0.5000 | 0.2500", "avg | 0.5000"):
        assert said in card


def test_spec_scores_and_stage_two(exported: Export) -> None:
    folder = exported.folder
    assert json.loads((folder / "spec.json").read_text())["learning_rate"] == 4e-5
    assert json.loads((folder / "scores.json").read_text())["eval"]["eval/avg/ndcg@10"] == 0.5
    config = json.loads((folder / "stage_II.json").read_text())
    assert config["model_name_or_path"] == str(folder)
    assert config["prompts"]["positive"] == config["prompts"]["negative"] == "<|im_start|>user\n"
    assert json.loads((folder / "llm2vec_config.json").read_text()) == {
        "pooling_mode": "eos_token",
        "max_length": 48,
        "doc_max_length": 48,
        "skip_instruction": False,
    }


@pytest.mark.parametrize("mode", ["last_token", "mean", "weighted_mean"])
def test_other_pooling_modes_are_certified_too(
    mode: str, small_model: Path, tmp_path: Path, certified_here: None
) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model, pooling_mode=mode))
    parity = export(checkpoint).parity
    assert {check["against"] for check in parity["checks"]} >= {"transformers", "sentence-transformers"}
    assert min(check["lowest_cosine"] for check in parity["checks"]) > 1 - 1e-6


def test_a_folder_that_gives_other_vectors_is_not_exported(
    run: Path, certified_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First-token pooling, as if the library had another idea of it."""
    monkeypatch.setattr(export_files, "_POOLING_OF_LIBRARY", {"eos_token": "pooling_mode_cls_token"})
    says = r"sentence-transformers \(batches of 1, padding left\) gives other vectors: cosine"
    with nothing_left(run), pytest.raises(RunError, match=says):
        export(run / "checkpoint-4")


def test_a_tokenizer_that_does_not_close_texts_is_not_exported(
    run: Path, certified_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anchor_cli.export import tokenizer as export_tokenizer

    monkeypatch.setattr(export_tokenizer, "_closing_processor", lambda original, contract: original)
    with nothing_left(run), pytest.raises(RunError, match=r"makes other token ids of \d+ of \d+ texts"):
        export(run / "checkpoint-4")


def test_without_sentence_transformers_the_certificate_says_so(
    run: Path, certified_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version, absent = certificate._version, "sentence-transformers"
    monkeypatch.setattr(certificate, "_version", lambda name: None if name == absent else version(name))
    parity = export(run / "checkpoint-4", out=run / "partly").parity
    assert parity["not_checked"] == ["sentence-transformers: not installed here"]
    assert {check["against"] for check in parity["checks"]} == {"transformers", "the checkpoint"}
    assert "not certified: sentence-transformers" in capsys.readouterr().err
    assert "Not checked: sentence-transformers" in (run / "partly" / "README.md").read_text()


def test_compare_by_hand() -> None:
    ours = Encoded(["a", "b"], [[1], [2]], np.array([[3.0, 0.0], [0.0, 2.0]]))
    same = compare("x", 1, "left", ours, Encoded(["a", "b"], [[1], [2]], np.array([[1.0, 0.0], [0.0, 9.0]])))
    assert same.passed and same.lowest_cosine == 1.0 and same.largest_difference == 0.0
    turned = compare("x", 1, "left", ours, Encoded(["a", "b"], [[1], [2]], np.array([[1.0, 0.0], [3.0, 4.0]])))
    assert not turned.passed and turned.lowest_cosine == pytest.approx(0.8) and turned.worst == "b"
    ids = compare("x", 1, "left", ours, Encoded(["a", "b"], [[1], [3]], ours.vectors))
    assert not ids.passed and ids.num_other_ids == 1 and ids.worst == "b"
    broken = compare("x", 1, "left", ours, Encoded(["a", "b"], [[1], [2]], np.full((2, 2), np.nan)))
    assert not broken.passed, "NaN is not equal"


def test_dtype_and_shards(run: Path, uncertified: None) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModel

    done = export(run / "checkpoint-4", out=run / "half", dtype="bfloat16", max_shard_size="60KB")
    shards = sorted(done.folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(done.folder).dtype == torch.bfloat16


def test_converted_weights_are_certified_against_themselves(run: Path, certified_here: None) -> None:
    parity = export(run / "checkpoint-4", out=run / "bf16", dtype="bfloat16").parity
    assert parity["passed"] and {check["against"] for check in parity["checks"]} == {
        "transformers",
        "sentence-transformers",
    }
    assert 0.99 < parity["lowest_cosine_to_the_checkpoint"] < 1


def refused(message: str, hint: str, kind: type[Exception], action: Any) -> None:
    with pytest.raises(kind) as caught:
        action()
    error: Any = caught.value
    assert message in error.message, error.message
    assert hint in (error.hint or ""), error.hint


def test_a_damaged_checkpoint_is_refused_and_whole_ones_are_named(small_model: Path, tmp_path: Path) -> None:
    contract = make_contract(small_model)
    for step in (1, 2):
        make_checkpoint(tmp_path, step, small_model, contract)
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with nothing_left(tmp_path):
        checksum = "damaged: model.safetensors was changed after it was written"
        refused(checksum, "checkpoint-1", InputError, lambda: export(tmp_path / "checkpoint-2"))
        (tmp_path / "checkpoint-2" / "tokenizer.json").unlink()
        refused("tokenizer.json is missing", "checkpoint-1", InputError, lambda: export(tmp_path / "checkpoint-2"))
        (tmp_path / "checkpoint-2" / "manifest.json").unlink()
        refused("manifest.json is missing", "checkpoint-1", InputError, lambda: export(tmp_path / "checkpoint-2"))


def test_a_foreign_tokenizer_is_refused(small_model: Path, tmp_path: Path, shared_data: Path) -> None:
    contract = make_contract(shared_data / "tokenizer")
    checkpoint = make_checkpoint(tmp_path, 1, small_model, contract)
    refused("its tokenizer is not the one", "put back the tokenizer.json", InputError, lambda: export(checkpoint))


def test_what_is_there_is_replaced_only_when_asked_and_only_if_it_is_an_export(
    run: Path, uncertified: None, tmp_path: Path
) -> None:
    checkpoint, out = run / "checkpoint-4", run / "again"
    export(checkpoint, out=out)
    (out / "mark").write_text("old")
    refused("exists already", "--force replaces it", InputError, lambda: export(checkpoint, out=out))
    assert (out / "mark").read_text() == "old"
    with nothing_left(run):
        export(checkpoint, out=out, force=True)
    assert not (out / "mark").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("is no export", "another folder", InputError, lambda: export(checkpoint, out=tmp_path, force=True))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    itself = "the checkpoint itself lies there"
    refused(itself, "", InputError, lambda: export(checkpoint, out=checkpoint, force=True))
    refused(itself, "", InputError, lambda: export(checkpoint, out=run, force=True))
    (tmp_path / "empty").mkdir()
    refused("exists already", "--force", InputError, lambda: export(checkpoint, out=tmp_path / "empty"))


def test_a_failed_replacement_leaves_the_old_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, checkpoint: Path, **_: Any) -> dict[str, Any]:
        raise RunError("certificate: no")

    monkeypatch.setattr(exporting, "certify", lambda folder, checkpoint, **_: dict(PASSED))
    out = export(run / "checkpoint-4", out=run / "kept").folder
    monkeypatch.setattr(exporting, "certify", fail)
    with nothing_left(run), pytest.raises(RunError):
        export(run / "checkpoint-2", out=out, force=True)
    assert json.loads((out / "scores.json").read_text())["step"] == 4


def test_no_room_is_said_before_and_while_writing(
    run: Path, uncertified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run / "checkpoint-4"
    with nothing_left(run), monkeypatch.context() as patched:
        patched.setattr(exporting, "free_bytes", lambda place: 1_000_000)
        refused("needs 0.07 GB, and 0.00 GB are free", "--out", RunError, lambda: export(checkpoint))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with nothing_left(run), monkeypatch.context() as patched:
        patched.setattr(exporting, "write_tokenizer", full)
        refused("the disk is full; nothing was exported", "--out", RunError, lambda: export(checkpoint))


def test_a_checkpoint_removed_by_its_run_meanwhile(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))

    def gone(*_: Any) -> None:
        checkpoint.rename(tmp_path / "elsewhere")
        raise FileNotFoundError(errno.ENOENT, "No such file", "tokenizer.json")

    monkeypatch.setattr(exporting, "write_tokenizer", gone)
    refused("was removed while it was being exported", "newer", RunError, lambda: export(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_checkpoint_of_another_trainer_is_a_plain_model(small_model: Path, tmp_path: Path, uncertified: None) -> None:
    """The research code's folders are called checkpoint-N, too, and have no manifest."""
    foreign = tmp_path / "checkpoint-2000"
    shutil.copytree(small_model, foreign)
    (foreign / "llm2vec_config.json").write_text("{}")
    assert export(foreign).folder.name == "checkpoint-2000-stage2"


def test_what_a_killed_export_left_is_swept_or_put_back(tmp_path: Path) -> None:
    """Killed while writing; killed between the two renames of --force; another host's and a live one's stay."""
    final, host, dead = tmp_path / "ex[1]", this_host(), 2**22 + 1  # above the highest process number of Linux
    mine, theirs, other = f"{host}-{os.getppid()}", f"elsewhere-{dead}", f"{host}-{dead}"
    kept = [f".ex[1].partial-{mine}", f".ex[1].partial-{theirs}", f".ex[1].v2.partial-{other}"]
    for name in (f".ex[1].partial-{host}-{dead}", *kept):
        (tmp_path / name).mkdir()
    (tmp_path / f".ex[1].old.partial-{host}-{dead}").mkdir()
    (tmp_path / f".ex[1].old.partial-{host}-{dead}" / "model").touch()
    sweep_staged(final)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "ex[1]"])
    assert (final / "model").exists(), "the only whole one is back"
    with staged_folder(final, replace=True) as folder:
        (folder / "new").touch()
        assert (final / "model").exists()
    assert [path.name for path in final.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "ex[1]"]), "nothing is left beside it"


def test_a_run_in_progress_is_said(run: Path, uncertified: None, capsys: pytest.CaptureFixture[str]) -> None:
    events = run / "events.jsonl"
    events.write_text('{"time": 0, "step": 0, "event": "start"}\n')
    export(run / "checkpoint-4", out=run / "early")
    assert "kure has not ended: this is its step 4" in capsys.readouterr().err
    events.write_text('{"time": 0, "step": 0, "event": "start"}\n{"time": 1, "step": 10, "event": "end"}\n')
    export(run / "checkpoint-4", out=run / "late")
    assert "has not ended" not in capsys.readouterr().err
    events.unlink()


def test_without_a_name_the_best_of_the_last_run_is_taken(
    run: Path,
    small_model: Path,
    tmp_path: Path,
    uncertified: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(run.parent)
    assert anchor(["export", "--stage2"]) == 2
    assert "no run is remembered" in capsys.readouterr().err
    remember_run(run)
    assert anchor(["export", "--stage2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["folder"] == str(run / "checkpoint-2-stage2")
    assert f"exporting {run / 'checkpoint-2'}: the best of the last run by eval/avg/ndcg@10" in err
    unscored = tmp_path / "output" / "unscored"
    unscored.mkdir(parents=True)
    for step in (1, 3):
        make_checkpoint(unscored, step, small_model, make_contract(small_model))
    remember_run(unscored)
    monkeypatch.chdir(tmp_path)
    assert anchor(["export", "--out", str(tmp_path / "x")]) == 0
    assert "checkpoint-3: the newest of the last run, none of which was evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}/checkpoint-9"], "no such folder"),
        (["{run}"], "not a model: no config.json\n  name one of its checkpoints: checkpoint-2, checkpoint-4"),
        (["{run}/checkpoint-4", "--dtype", "int8"], "--dtype int8: expected one of float32, bfloat16, float16"),
        (["{run}/checkpoint-4", "--max-shard-size", "huge"], "--max-shard-size huge"),
        (["{run}/checkpoint-4", "--out", "{run}/metrics.jsonl"], "is a file"),
        (["{run}/checkpoint-4", "--push-to-hub", "kure"], "expected NAMESPACE/NAME"),
        (["{run}/checkpoint-4", "--push-to-hub", "me/kure"], "no token\n  set HF_TOKEN"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    said: str,
    run: Path,
    uncertified: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with nothing_left(run):
        assert anchor(["export", *(argument.format(run=run) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_a_plain_model_can_be_put_into_the_form(
    small_model: Path, tmp_path: Path, certified_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """For comparing Stage II with and without Stage I."""
    done = export(small_model, out=tmp_path / "plain")
    assert done.parity["passed"] and not (done.folder / "spec.json").exists()
    assert "not a checkpoint of anchor train" in capsys.readouterr().err


def test_the_document_is_complete(exported: Export) -> None:
    document = exported.as_dict()
    assert document["certificate"]["passed"] and document["certificate"]["num_texts"] > 90
    assert set(document) == {"folder", "checkpoint", "dtype", "certificate"}
