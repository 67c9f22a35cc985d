"""examples/stage2: both scripts train from an export, and InfoNCE is what the naive loop says."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples" / "stage2"
ROWS = [
    ("수달은 어디에 사나요?", "수달은 강과 바다에 사는 동물이다.", "주민센터에서 신청할 수 있는 급여", "ko"),
    ("급여는 어디에서 신청하나요?", "복지 급여는 주민센터에서 신청할 수 있다.", "수달은 강에 산다.", "ko"),
    ("Where do otters live?", "Otters live in rivers and in the sea.", "Apply at the community centre.", "en"),
    ("Where can I apply?", "You can apply for the benefit at the community centre.", "Otters live in rivers.", "en"),
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    return script("train_plain_pytorch")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from anchor_cli.demo.demo import Recipe, make_model
    from anchor_cli.export.export import export

    folder = tmp_path_factory.mktemp("stage2")
    make_model(folder / "model", Recipe(hidden_size=64, intermediate_size=128, num_layers=2))
    return export(folder / "model", out=folder / "export").folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    names = ("anchor", "positive", "negative", "language")
    path.write_text("".join(json.dumps(dict(zip(names, row)), ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    return path


def test_info_nce_is_the_naive_sum(plain: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (3, 5))
    same = torch.zeros(3, 5, dtype=torch.bool)
    same[0, 2] = True  # candidate 2 is query 0's own document again
    total = 0.0
    for i in range(3):
        weights = [math.exp(float(queries[i] @ candidates[j]) / 0.5) for j in range(5) if not same[i, j]]
        total -= math.log(math.exp(float(queries[i] @ candidates[i]) / 0.5) / sum(weights))
    assert plain.info_nce(queries, candidates, 0.5, same).item() == pytest.approx(total / 3, rel=1e-12)


def test_same_texts_are_no_negatives(plain: ModuleType) -> None:
    got = plain.same_texts(["a", "b", "a", "b"], 2)
    assert got.tolist() == [[False, False, True, False], [False, False, False, True]]


def test_plain_embeddings_are_our_encoder_s(plain: ModuleType, exported: Path) -> None:
    """The loop's tokens, padding and pooling against the packed encoder: mixed lengths, truncation, both languages."""
    from transformers import AutoModel

    from anchor_cli.evaluate.embedder import load_embedder

    ours, texts = load_embedder(exported, device="cpu"), plain.Texts(exported)
    model = AutoModel.from_pretrained(exported, dtype=torch.float32)
    contents = [row[1] for row in ROWS] + ["수달 " * 600]
    with torch.no_grad():
        theirs = plain.embed(model, [texts.document(text) for text in contents], texts.eos)
    want = torch.nn.functional.normalize(torch.from_numpy(ours.encode_documents(contents, "ko")), dim=-1)
    torch.testing.assert_close(theirs, want, atol=1e-5, rtol=0)
    rows = [{"anchor": row[0], "language": row[3]} for row in ROWS]
    with torch.no_grad():
        theirs = plain.embed(model, [texts.query(row) for row in rows], texts.eos)
    for row, vector in zip(rows, theirs, strict=True):
        want = torch.from_numpy(ours.encode_queries([row["anchor"]], row["language"])[0])
        torch.testing.assert_close(vector, want / want.norm(), atol=1e-5, rtol=0)


def test_plain_pytorch_trains_and_saves(plain: ModuleType, exported: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "stage2"
    losses = plain.main([str(exported), str(rows), "--out", str(out), "--steps", "12", "--learning-rate", "1e-3"])
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    from anchor_cli.evaluate.embedder import load_embedder

    before, after = (load_embedder(path, device="cpu").encode_documents(["수달"], "ko") for path in (exported, out))
    assert abs(before - after).max() > 1e-3
    assert (out / "modules.json").is_file()
    assert not any((out / name).exists() for name in ("parity.json", "README.md", "scores.json", "stage_II.json"))


@pytest.mark.parametrize("loss", ["in-batch", "guided", "kure"])
def test_sentence_transformers_trains(loss: str, exported: Path, rows: Path, tmp_path: Path) -> None:
    trainer, out = script("train_sentence_transformers"), tmp_path / "stage2"
    guide = ["--mini-batch-size", "2"] if loss != "in-batch" else []
    guide += {"in-batch": [], "guided": ["--guide", str(exported)], "kure": ["--recipe", "kure"]}[loss]
    metrics = trainer.main(
        [str(exported), str(rows), "--out", str(out), "--steps", "20", "--batch-size", "2", "--learning-rate", "1e-3"]
        + guide
    )
    assert metrics["last_loss"] < 0.8 * metrics["first_loss"]
    ranks_its_rows(out)


def ranks_its_rows(model: Path) -> None:
    """As trained, each language with its own instruction and in-batch negatives; by the library and by our encoder."""
    from sentence_transformers import SentenceTransformer

    from anchor_cli.evaluate.embedder import PackedEmbedder, load_embedder

    theirs, ours = SentenceTransformer(str(model), device="cpu"), load_embedder(model, device="cpu")
    assert isinstance(ours, PackedEmbedder), "the contract went along"
    for language in ("ko", "en"):
        queries, documents = ([row[at] for row in ROWS if row[3] == language] for at in (0, 1))
        vectors = theirs.encode_query(queries, prompt_name=f"query_{language}")
        assert theirs.similarity(vectors, theirs.encode_document(documents)).argmax(dim=1).tolist() == [0, 1]
        want = torch.nn.functional.normalize(torch.from_numpy(ours.encode_queries(queries, language)), dim=-1)
        torch.testing.assert_close(torch.from_numpy(vectors), want, atol=1e-5, rtol=0)


def test_stage_two_from_a_bfloat16_export(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are trained in fp32: at this rate bf16 ones would stay. The tokenizer's class is another than Qwen's."""
    from safetensors.torch import load_file

    from anchor_cli.export.export import export

    check = {"against": "transformers", "lowest_cosine": 1.0}
    passed = {"passed": True, "num_texts": 1, "num_truncated": 0, "not_checked": [], "checks": [check]}
    monkeypatch.setattr("anchor_cli.export.export.certify", lambda *_, **__: passed)  # test_export.py runs the real one
    out = tmp_path / "stage2"
    start = export(small_model, out=tmp_path / "export", dtype="bfloat16").folder
    trainer = script("train_sentence_transformers")
    steps = ["--steps", "20", "--batch-size", "2"]
    trainer.main([str(start), str(rows), "--out", str(out), *steps, "--learning-rate", "2e-5"])
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    before, after = ({name.removeprefix("model."): t for name, t in tensors.items()} for tensors in (before, after))
    name = "layers.0.mlp.down_proj.weight"
    assert (before[name].dtype, after[name].dtype) == (torch.bfloat16, torch.float32)
    moved = (after[name] - before[name].float()).abs()
    assert 0 < moved.median() < 1e-3, "every weight moved, by less than bf16 can tell apart"
    again = tmp_path / "again"
    trainer.main([str(start), str(rows), "--out", str(again), *steps, "--learning-rate", "1e-2"])
    ranks_its_rows(again)


def test_stage_two_settings_are_read_or_refused(exported: Path, tmp_path: Path) -> None:
    trainer, path = script("train_sentence_transformers"), tmp_path / "stage_II.json"
    settings = json.loads((exported / "stage_II.json").read_text())
    path.write_text(json.dumps(settings | {"weight_decay": 0.5}))
    got = trainer.settings_of(tmp_path)
    assert (got["weight_decay"], got["warmup_steps"], got["gradient_checkpointing"]) == (0.5, 0.1, True)
    path.write_text(json.dumps(settings | {"learning_rte": 1, "weights": "all"}))
    with pytest.raises(SystemExit, match="nothing here reads learning_rte, weights"):
        trainer.settings_of(tmp_path)


def test_a_recipe_is_taken_over_the_simple_values(exported: Path, tmp_path: Path) -> None:
    """KURE's: the same values as the shipped spec of `anchor train` has."""
    trainer = script("train_sentence_transformers")
    got = trainer.settings_of(exported, "kure")
    spec = json.loads((EXAMPLES.parents[1] / "train_configs/stage_II/Qwen3_0.6b_kure.json").read_text())
    same = "temperature margin_strategy margin hardness_mode hardness_strength num_hard_negatives learning_rate".split()
    for name in (*same, "num_train_epochs", "eval_steps", "save_steps", "logging_steps"):
        assert got[name] == spec[name], name
    assert got["warmup_steps"] == spec["warmup_ratio"]
    assert got["per_device_train_batch_size"] == spec["negatives_group_size"]
    assert (got["loss"], trainer.settings_of(exported)["loss"]) == ("SelfGuidedLoss", "MultipleNegativesRankingLoss")
    with pytest.raises(SystemExit, match=r"no recipe kura; it has kure"):
        trainer.settings_of(exported, "kura")


# -- the loss of KURE's recipe -----------------------------------------------------------------------------------------

MODES = [None, "hard_negatives", "explicit_negatives", "in_batch_negatives", "all_negatives"]


def naive_self_guided(q: torch.Tensor, d: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The formula, one candidate at a time: q (G, D), d (G, K, D), a row's positive first."""
    total = q.new_zeros(())
    num_rows, num_documents, _ = d.shape
    for i in range(num_rows):

        def cosine(j: int, k: int, i: int = i) -> torch.Tensor:
            return (q[i] @ d[j, k]) / (q[i].norm() * d[j, k].norm())

        s_p, terms = cosine(i, 0), []
        for j in range(num_rows):
            for k in range(num_documents):
                s, positive = cosine(j, k), (j, k) == (i, 0)
                margin, strategy = settings["margin"], settings["margin_strategy"]
                limit = {None: math.inf, "absolute": s_p - margin, "relative": s_p * (1 - margin)}[strategy]
                if not positive and s > limit:
                    continue
                hard = {
                    None: False, "hard_negatives": j == i and k > 0, "explicit_negatives": k > 0,
                    "in_batch_negatives": j != i, "all_negatives": not positive,
                }[settings["hardness_mode"]]  # fmt: skip
                terms.append(s / settings["temperature"] + hard * settings["hardness_strength"] * s.detach())
        total = total + torch.stack(terms).logsumexp(0) - s_p / settings["temperature"]
    return total / num_rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("strategy", "margin"), [(None, 0.0), ("absolute", -0.1), ("relative", 0.05)])
def test_the_self_guided_loss_is_the_formula_and_anchor_trains_loss(
    mode: str | None, strategy: str | None, margin: float
) -> None:
    """float64, loss and every gradient; in mini-batches that do not divide the rows; and with a backward a chunk."""
    from anchor_cli.model.contrast import ContrastRows, ContrastSettings, contrastive_loss

    settings = {"temperature": 0.05, "margin_strategy": strategy, "margin": margin, "hardness_mode": mode,
                "hardness_strength": 5.0 if mode else 0.0}  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    d = torch.randn(7, 3, 6, generator=generator, dtype=torch.float64)
    d[:, 0] += 0.7 * q.detach()  # positives are near, but not always the nearest
    d.requires_grad_()
    want = naive_self_guided(q, d, settings)
    want_gradients = torch.autograd.grad(want, (q, d))
    loss = script("train_sentence_transformers").SelfGuidedLoss(
        torch.nn.Sequential(torch.nn.Identity()), mini_batch_size=3, **settings
    )
    for with_backward in (False, True):
        leaves = [side.detach().clone().requires_grad_() for side in (q, *d.unbind(1))]
        got = loss.calculate_loss([list(side.split(3)) for side in leaves], with_backward=with_backward)
        if not with_backward:
            got.backward()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        gradients = leaves[0].grad, torch.stack([side.grad for side in leaves[1:]], dim=1)
        torch.testing.assert_close(gradients, want_gradients, rtol=1e-10, atol=1e-12)
    rows = ContrastRows(range(0, 22, 3), torch.empty(2, 0, dtype=torch.int64))
    ours = contrastive_loss(q, d.flatten(0, 1), rows, ContrastSettings(**settings))
    torch.testing.assert_close(ours.loss, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.query_gradients, want_gradients[0], rtol=1e-10, atol=1e-12)
    if strategy:
        assert ours.counts.metrics()["dropped_by_margin_share"] > 0


# -- rows as people have them, and what is refused ---------------------------------------------------------------------


def test_rows_come_from_files_of_every_kind_and_from_mined_folders(rows: Path, tmp_path: Path) -> None:
    from datasets import Dataset, load_dataset

    trainer = script("train_sentence_transformers")
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path / "cache"))
    data.to_csv(tmp_path / "pairs.csv")
    data.to_parquet(tmp_path / "pairs.parquet")
    names = ["anchor", "positive", "negative", "language"]
    for path in (rows, tmp_path / "pairs.csv", tmp_path / "pairs.parquet"):
        got = trainer.load_rows(path, 4)
        assert got.column_names == names and got[0] == dict(zip(names, ROWS[0], strict=True))
    mined = {
        "anchor": ["q1", "q2", "q3"], "positive": ["p1", "p2", "p3"], "negatives": [["a", "b", "c"], ["d"], []],
        "positive_score": [0.9, 0.8, 0.7], "negative_scores": [[0.5, 0.4, 0.3], [0.2], []],
    }  # fmt: skip
    Dataset.from_dict(mined).save_to_disk(tmp_path / "mined")
    got = trainer.load_rows(tmp_path / "mined", 2)
    assert got.to_dict() == {
        "anchor": ["q1", "q2"], "positive": ["p1", "p2"], "negative_1": ["a", "d"], "negative_2": ["b", "d"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pairs.txt", "a\tb\n", "expected .jsonl, .json, .csv, .parquet"),
        ("pairs.jsonl", "not json\n", "could not be read"),
        ("pairs.csv", "query,document\nq,d\n", "no column anchor, positive; it has query, document"),
        ("pairs.json", None, "not found"),
    ],
)
def test_data_that_cannot_be_read_end_in_words(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=says):
        script("train_sentence_transformers").load_rows(tmp_path / name, 4)


def test_a_raw_checkpoint_is_no_start(small_model: Path, rows: Path, tmp_path: Path) -> None:
    """It has no prompts, and its tokenizer closes no text: training would go on, on other texts."""
    import shutil

    from export_fixtures import make_checkpoint, make_contract

    checkpoint = make_checkpoint(tmp_path, 1, small_model, make_contract(small_model))
    for name in ("train_sentence_transformers", "train_plain_pytorch"):
        with pytest.raises(SystemExit, match=r"checkpoint-1: not an export of anchor.*anchor export .*checkpoint-1"):
            script(name).main([str(checkpoint), str(rows), "--out", str(tmp_path / "out")])
    shutil.rmtree(checkpoint)
    with pytest.raises(SystemExit, match="not found"):
        script("train_sentence_transformers").main([str(checkpoint), str(rows), "--out", str(tmp_path / "out")])


def test_fewer_steps_than_logging_steps_and_an_evaluation(
    exported: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, the guide is the export itself, as stage_II.json asks; nDCG@10 as evaluate() has it."""
    import shutil

    from anchor_cli.data.benchmarks.beir import read_beir
    from anchor_cli.evaluate.embedder import load_embedder
    from anchor_cli.evaluate.evaluate import evaluate

    start, beir = tmp_path / "export", tmp_path / "beir"
    shutil.copytree(exported, start)
    settings = json.loads((start / "stage_II.json").read_text())
    settings |= {"loss": "CachedGISTEmbedLoss", "logging_first_step": False}
    (start / "stage_II.json").write_text(json.dumps(settings))
    (beir / "qrels").mkdir(parents=True)
    ids = [str(number) for number in range(len(ROWS))]
    for file, column in (("queries", 0), ("corpus", 1)):
        lines = [json.dumps({"_id": i, "text": row[column], "title": ""}) for i, row in zip(ids, ROWS, strict=True)]
        (beir / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{i}\t{i}\t1\n" for i in ids))
    out = tmp_path / "out"
    metrics = script("train_sentence_transformers").main(
        [str(start), str(rows), "--out", str(out), "--steps", "2", "--batch-size", "2", "--eval", f"en:{beir}"]
    )
    assert "first_loss" not in metrics or metrics["first_loss"] > 0
    (got,) = (value for name, value in metrics.items() if name.endswith("cosine_ndcg@10"))
    assert 0 < got <= 1
    want = evaluate(load_embedder(out, device="cpu"), [read_beir(beir, language="en")])["avg"]["ndcg@10"]
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_write_one_folder(exported: Path, rows: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(EXAMPLES / "train_sentence_transformers.py"), str(exported), str(rows), "--out", str(out)]
    command += ["--steps", "2", "--batch-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained 2 steps") == 1
    assert (out / "anchor.json").is_file() and (out / "model.safetensors").is_file()
