"""What `anchor mine` reads and writes: whose folder, which state of the pairs, whose tokenizer, every row."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mine_worker import BagOfWords
from transformers import BertConfig, BertModel, BertTokenizerFast

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.mine import mine
from anchor_cli.mine.corpus import corpus_of
from anchor_cli.mine.run import Mining, finish, mine_rank, open_pairs, prepare_raw_pairs, require_new
from anchor_cli.mine.select import Rules
from anchor_cli.mine.store import Store

RULES = Rules(num_negatives=2, relative_margin=None, min_characters=1)


def write_pairs(path: Path, word: str, num: int = 6) -> Path:
    rows = [{"anchor": f"{word} {index}", "positive": f"otters of {word} number {index}"} for index in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(job: Mining) -> list[str]:
    """All of a mining in this process. Returns the mined queries."""
    require_new(job)
    prepare_raw_pairs(job)
    finish(job, *mine_rank(job, 0, 1, 0))
    mined = PreparedPairs.open(job.out)
    return [mined.texts(row)[0] for row in range(len(mined))]


def test_a_work_dir_that_holds_something_else_is_refused_and_stays(tmp_path: Path, small_model: Path) -> None:
    pairs = write_pairs(tmp_path / "a.jsonl", "a")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "thesis.txt").write_text("years of work")
    job = Mining(str(pairs), small_model, tmp_path / "out", RULES, work_dir=tmp_path / "scratch")
    for step in (require_new, prepare_raw_pairs):
        with pytest.raises(InputError, match="holds files that anchor mine did not write"):
            step(job)
    with pytest.raises(InputError, match="did not write"):
        mine.begin(job.store, mine.plan_of({}, RULES))
    assert [path.name for path in job.store.iterdir()] == ["thesis.txt"]


def test_another_plan_removes_what_a_mining_wrote_and_nothing_else(tmp_path: Path) -> None:
    store = mine.begin(tmp_path / "work", mine.plan_of({"model": "a"}, RULES))
    store.vectors("queries", 2, 3)
    store.mark_done("queries", 0)
    store.write_result(0, {"rows": np.zeros(1)})
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "logs").mkdir()
    mine.begin(store.folder, mine.plan_of({"model": "b"}, RULES))
    assert sorted(path.name for path in store.folder.iterdir()) == ["logs", "notes.txt", "plan.json"]


def test_raw_pairs_are_prepared_again_when_they_are_others(tmp_path: Path, small_model: Path) -> None:
    """Another file with the same work folder, and the same file with other rows: never the rows of before."""
    work = tmp_path / "work"
    job = Mining(str(write_pairs(tmp_path / "a.jsonl", "first")), small_model, tmp_path / "one", RULES, work_dir=work)
    assert run(job) == [f"first {index}" for index in range(6)]
    other = str(write_pairs(tmp_path / "b.jsonl", "second"))
    assert run(replace(job, pairs=other, out=tmp_path / "two")) == [f"second {index}" for index in range(6)]
    interrupted = replace(job, out=tmp_path / "three", work_dir=None)
    prepare_raw_pairs(interrupted)  # and then it was killed
    write_pairs(tmp_path / "a.jsonl", "third", num=5)
    assert run(interrupted) == [f"third {index}" for index in range(5)]
    assert not interrupted.store.exists()


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder of another architecture and tokenizer: BERT, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("foreign")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "otters", "of", "number", "a", *map(str, range(9))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def test_a_model_with_another_tokenizer_mines_for_the_one_that_will_train(
    tmp_path: Path, small_model: Path, foreign_model: Path
) -> None:
    """Refused before anything is encoded; with --tokenizer the rows have the tokens of their pairs."""
    raw = write_pairs(tmp_path / "pairs.jsonl", "a")
    prepare([str(raw)], tmp_path / "pairs", tokenizer=small_model, max_seq_length=64)
    job = Mining(str(tmp_path / "pairs"), foreign_model, tmp_path / "out", RULES)
    with pytest.raises(InputError, match="prepared with another tokenizer") as refused:
        mine_rank(job, 0, 1, 0)
    assert "--tokenizer" in str(refused.value.hint) and not job.store.exists()
    assert run(replace(job, tokenizer=str(small_model))) == [f"a {index}" for index in range(6)]
    got, source = PreparedPairs.open(tmp_path / "out"), PreparedPairs.open(tmp_path / "pairs")
    got.require(source.contract)
    for row in range(len(source)):
        for side in (0, 1):
            assert got.tokens([row])[side][0].tolist() == source.tokens([row])[side][0].tolist()
    from_raw = replace(job, pairs=str(raw), out=tmp_path / "from-raw")
    with pytest.raises(InputError, match="cannot be prepared for") as refused:
        prepare_raw_pairs(from_raw)
    assert "--tokenizer" in str(refused.value.hint) and not from_raw.store.exists()
    assert run(replace(from_raw, tokenizer=str(small_model))) == [f"a {index}" for index in range(6)]


def test_pairs_of_our_own_with_another_vocabulary_are_not_tokenised_anew(tmp_path: Path, small_model: Path) -> None:
    """The same special tokens, one merge less: rows would have other ids than the pairs, and training refuses them."""
    other = shutil.copytree(small_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    prepare([str(write_pairs(tmp_path / "pairs.jsonl", "a"))], tmp_path / "pairs", tokenizer=other, max_seq_length=64)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        open_pairs(Mining(str(tmp_path / "pairs"), small_model, tmp_path / "out", RULES))


def test_a_document_beyond_the_usual_length_is_mined_too(tmp_path: Path, small_model: Path) -> None:
    raw = write_pairs(tmp_path / "pairs.jsonl", "a")
    long = {"anchor": "long", "positive": "otter " * 180_000}
    raw.write_text(raw.read_text() + json.dumps(long) + "\n", encoding="utf-8")
    options = Options(max_characters=3_000_000)
    prepare([str(raw)], tmp_path / "pairs", tokenizer=small_model, max_seq_length=64, options=options)
    mined = run(Mining(str(tmp_path / "pairs"), small_model, tmp_path / "out", RULES))
    assert mined[-1] == "long" and len(mined) == 7
    assert json.loads((tmp_path / "out" / "mining.json").read_text())["rows"] == 7


def test_a_model_that_gives_nan_ends_the_mining(tmp_path: Path, small_model: Path) -> None:
    class Diverged(BagOfWords):
        def encode_documents(self, texts, language):  # type: ignore[no-untyped-def]
            vectors = super().encode_documents(texts, language)
            vectors[-1, 3] = np.nan
            return vectors

    prepare([str(write_pairs(tmp_path / "pairs.jsonl", "a"))], tmp_path / "pairs", tokenizer=small_model)
    store, corpus = Store(tmp_path / "store"), corpus_of(PreparedPairs.open(tmp_path / "pairs"))
    with pytest.raises(RunError, match="not finite"):
        mine.encode(corpus, Diverged(), store, mine.Place())
    assert not store.is_done("documents", 0)
