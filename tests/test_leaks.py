"""Leaks: rows whose query or document is in a benchmark, whatever its spelling; and none else."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from data_fixtures import needs_shared, tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_cli.data.benchmarks.beir import Benchmark, read_beir
from anchor_cli.data.prepare.leaks import Leak, LeakIndex, words_of
from anchor_cli.data.prepare.prepare import Options, prepare

__all__ = ["tokenizer_folder"]
LONG = "the river otter eats fish and frogs and lives in a den near the water all year round"  # 17 words
KOREAN = (  # 16 words
    "수달은 강가의 굴에서 살며 물고기와 개구리를 먹고 겨울에도 잠을 자지 않으며 밤에 주로 움직이는 동물로 알려져 있다"
)
BENCHMARK = Benchmark(
    "en/otters",
    "en",
    {"q1": "Where do otters live?", "q2": "수달은 어디에 사나요?"},
    {"d1": LONG, "d2": "Otters.", "d3": KOREAN},
    {"q1": {"d1": 1}},
)
INDEX = LeakIndex.build([Benchmark("ko/empty", "ko", {}, {}, {}), BENCHMARK])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Where do otters live?", "leak_query"),
        ("  where DO  otters live", "leak_query"),
        ("Ｗｈｅｒｅ do otters live!!", "leak_query"),
        (unicodedata.normalize("NFD", "수달은 어디에 사나요"), "leak_query"),
        ("otters", "leak_document"),
        (LONG.replace(" ", "\n").upper(), "leak_document"),
        (f"Some say that {LONG.replace('fish', 'fish,')}, but not all.", "leak_ngram"),
        (" ".join(LONG.split()[2:15]), "leak_ngram"),  # exactly 13 words
        (" ".join(LONG.split()[2:14]), None),  # 12
        (f"위키백과: {KOREAN}고 한다.", "leak_ngram"),
        ("Where do seals live?", None),
        ("", None),
        ("?!", None),
    ],
)
def test_find(text: str, reason: str | None) -> None:
    assert INDEX.find(text) == (None if reason is None else Leak(reason, "en/otters"))


def naive_overlap(text: str, benchmark_text: str, num: int) -> bool:
    """By lists of words, without hashes."""
    ours, theirs = words_of(text), words_of(benchmark_text)
    runs = [theirs[at : at + num] for at in range(len(theirs) - num + 1)]
    return any(ours[at : at + num] in runs for at in range(len(ours) - num + 1))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_runs_of_words_against_a_naive_search(seed: int, num: int) -> None:
    rng = random.Random(seed)
    words = ["otter", "강", "fish", "수달은", "a"]
    theirs, ours = (" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2))
    index = LeakIndex.build([Benchmark("x", "en", {}, {"d": theirs}, {})], num)
    want = naive_overlap(ours, theirs, num) or (bool(words_of(ours)) and words_of(ours) == words_of(theirs))
    assert (index.find(ours) is not None) == want


def test_cjk_characters_are_words() -> None:
    assert words_of("カワウソは魚A1を") == ["カ", "ワ", "ウ", "ソ", "は", "魚", "a1", "を"]


def test_a_saved_index_finds_the_same(tmp_path: Path) -> None:
    INDEX.save(tmp_path)
    loaded = LeakIndex.load(tmp_path)
    for text in (LONG, "otters", "where do otters live", "no", f"x {LONG}"):
        assert loaded.find(text) == INDEX.find(text)


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": text} for key, text in BENCHMARK.corpus.items()]
    queries = [{"_id": key, "text": text} for key, text in BENCHMARK.queries.items()]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = "".join(f"{query}\td1\t1\n" for query in BENCHMARK.queries)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return folder


def test_prepare_leaves_leaks_out_and_counts_them(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = beir(tmp_path / "otters")
    rows = [
        ("Where do otters live?", "In rivers."),
        ("Which animal eats fish?", LONG),
        ("Which animal eats frogs?", f"Well, {LONG}."),
        ("Where do seals live?", "In the sea."),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in rows))
    summary = prepare(
        [str(path)], tmp_path / "out", tokenizer=tokenizer_folder, options=Options(exclude=(str(folder),))
    )
    found = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"], line["side"], line["benchmark"]) for line in found] == [
        (0, "leak_query", "query", "ko/otters"),  # half of its queries are Korean
        (1, "leak_document", "document", "ko/otters"),
        (2, "leak_ngram", "document", "ko/otters"),
    ]
    assert summary.as_dict()["rejected"] == {"leak_query": 1, "leak_document": 1, "leak_ngram": 1}
    assert not (tmp_path / "out" / "scratch").exists()
    short = prepare(
        [str(path)],
        tmp_path / "two",
        tokenizer=tokenizer_folder,
        options=Options(exclude=(str(folder),), exclude_ngram=99),
    )
    assert short.as_dict()["rejected"] == {"leak_query": 1, "leak_document": 1}


@needs_shared
def test_no_text_of_a_real_benchmark_gets_through(shared_data: Path) -> None:
    benchmark = read_beir(shared_data / "beir" / "welfare-ko")
    index = LeakIndex.build([benchmark])
    texts = [*benchmark.queries.values(), *benchmark.corpus.values()][::20]
    assert all(index.find(text) is not None for text in texts)
    other = read_beir(shared_data / "beir" / "vaswani")
    assert [text for text in list(other.queries.values()) if index.find(text)] == []
