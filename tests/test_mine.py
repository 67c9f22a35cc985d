"""Mining against a float64 loop over everything, written out here; whatever kills it, it gives the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from mine_worker import BagOfWords, mined

from anchor_cli.base.contract import INSTRUCTION_KO
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import prepare
from anchor_cli.mine import mine
from anchor_cli.mine.run import Mining, finish, mine_rank
from anchor_cli.mine.select import Rules

SHARED = Path(os.environ.get("ANCHOR_SHARED", Path(__file__).parents[2] / "shared"))
SEPARATOR = "!@#$%^&*()"
WORDS = "otter river lake boat stone wind reed frog heron moss 수달 강 호수 바람 갈대 이끼".split()


def text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


def rows(seed: int, num: int) -> list[dict[str, str]]:
    """Queries that come several times, positives that come several times, near-duplicates, short ones, the query as a
    document; and records, whose queries have an instruction of their own, in some rows of the same text another one."""
    generator = random.Random(seed)
    made = []
    for index in range(num):
        query, document = text(generator, 3), text(generator, 12)
        kind = index % 8
        if kind == 1:
            query = made[generator.randrange(len(made))]["anchor"]
        elif kind == 2:
            document = made[generator.randrange(len(made))]["positive"]
        elif kind == 3:
            document = made[-1]["positive"] + " otter"
        elif kind == 4:
            document = generator.choice(["강", "otter", "lake 강"]) + str(index)
        elif kind == 5:
            document = made[generator.randrange(len(made))]["anchor"]
        elif kind == 6:
            document = "  " + made[-2]["positive"].replace(" ", "\n", 1)
        made.append({"anchor": query, "positive": document, "language": "ko" if index % 3 else "en"})
    for index in range(7, num, 8):
        made[index]["anchor"] = f"find reed {index // 8 % 2}; {SEPARATOR}{made[index - 8 * (index > 7)]['anchor']}"
        made[index]["positive"] = SEPARATOR + made[index]["positive"]
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(0, 400))
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    prepare([str(folder / "pairs.jsonl")], folder / "prepared", tokenizer=small_model, max_seq_length=64)
    return folder / "prepared"


def same(one: str) -> str:
    return " ".join(unicodedata.normalize("NFC", one).split())


def near(one: str, other: str) -> bool:
    if min(len(one), len(other)) < 0.8 * max(len(one), len(other)) - 5:
        return False
    left, right = ({x[i : i + 5] for i in range(max(1, len(x) - 4))} for x in (one, other))
    return len(left & right) >= 0.8 * len(left | right)


def oracle(prepared: Path, rules: Rules, further: list[str]) -> list[tuple[list[str], float, list[float]]]:
    """Negatives' texts, the positive's score and the negatives' scores of every row, by the definition."""
    pairs = PreparedPairs.open(prepared)
    table = [pairs.texts(row) for row in range(len(pairs))]
    documents = list(dict.fromkeys(same(document) for _, document, _ in table))
    documents += [x for x in dict.fromkeys(map(same, further)) if x not in set(documents)]
    spelled = {same(x): x for x in reversed([document for _, document, _ in table] + further)}
    spelled |= {same(document): document for _, document, _ in reversed(table)}
    given = [pairs.cell(row, "anchor") for row in range(len(pairs))]
    prefixes = [x.split(SEPARATOR)[0] if SEPARATOR in x else f"{INSTRUCTION_KO}; " for x in given]
    first_query = {
        (prefix, same(query)): query for prefix, (query, _, _) in reversed(list(zip(prefixes, table, strict=True)))
    }
    model = BagOfWords()
    right = model.encode_documents([spelled[x] for x in documents], "").astype(np.float64)
    out = []
    for row, (query, document, _) in enumerate(table):
        left = model.encode_documents([prefixes[row] + first_query[prefixes[row], same(query)]], "")[0]
        left = left.astype(np.float64)
        lengths = np.sqrt((right * right).sum(1)) * np.sqrt((left * left).sum())
        scores = (right * left).sum(1) / np.maximum(lengths, 1e-12)
        positives = {same(d) for q, d, _ in table if same(q) == same(query)}
        positive = scores[documents.index(same(document))]
        window = [
            place
            for place in sorted(range(len(documents)), key=lambda place: (-scores[place], place))
            if documents[place] not in positives | {same(query)} and len(documents[place]) >= rules.min_characters
        ][rules.range_min : rules.range_max]
        left_over = [
            place
            for place in window
            if (rules.min_score is None or scores[place] >= rules.min_score)
            and (rules.max_score is None or scores[place] <= rules.max_score)
            and (rules.absolute_margin is None or scores[place] <= positive - rules.absolute_margin)
            and (rules.relative_margin is None or scores[place] <= positive - rules.relative_margin * abs(positive))
        ]
        if rules.sampling == "random":
            order = np.random.default_rng([rules.seed, row]).permutation(len(left_over))
            left_over = [left_over[at] for at in order]
        taken = [place for place in left_over if not any(near(documents[place], p) for p in positives)]
        taken = sorted(taken[: rules.num_negatives], key=lambda place: (-scores[place], place))
        out.append(([spelled[documents[p]] for p in taken], float(positive), [float(scores[p]) for p in taken]))
    return out


RULES = [
    Rules(),
    Rules(num_negatives=3, range_min=2, range_max=9, relative_margin=None),
    Rules(min_score=0.1, max_score=0.7, relative_margin=None, absolute_margin=0.02),
    Rules(sampling="random", seed=7, relative_margin=None, min_characters=1),
    Rules(range_max=1000, relative_margin=0.3, num_negatives=100),
]


@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
def test_it_is_the_definition(prepared: Path, tmp_path: Path, rules: Rules) -> None:
    further = [text(random.Random(9), 10), rows(0, 400)[3]["positive"], "수달  강 강 강 강 강 강"]
    want = oracle(prepared, rules, further)
    store, corpus = mined(prepared, tmp_path / "store", rules, further)
    got = mine.results(store, corpus)
    assert len(got) == len(want)
    rows_of_all = mine.records(got, corpus, range(len(want)))
    for record, (negatives, positive, scores) in zip(rows_of_all, want, strict=True):
        assert record["negatives"] == negatives
        assert record["positive_score"] == positive and record["negative_scores"] == scores
    lengths = Counter(len(negatives) for negatives, _, _ in want)
    assert len(lengths) > 1 or rules.relative_margin is None, "rows have different numbers of negatives"
    assert got.rejected["known_positive"] and got.rejected["query_itself"] and got.rejected["near_duplicate"]


def test_a_query_is_encoded_with_the_very_tokens_of_training(prepared: Path, small_model: Path, tmp_path: Path) -> None:
    """Rows' own instructions, the run's instruction, both languages: transformers' own encoding of the prepared ids."""
    import torch
    from transformers import AutoModel

    from anchor_cli.evaluate.embedder import load_embedder
    from anchor_cli.mine.corpus import corpus_of

    pairs = PreparedPairs.open(prepared)
    corpus, embedder = corpus_of(pairs), load_embedder(small_model, device="cpu", prepared=pairs.contract)
    store = mine.begin(tmp_path / "store", mine.plan_of({}, Rules()))
    mine.encode(corpus, embedder, store, mine.Place())
    got = torch.from_numpy(np.array(store.vectors("queries", corpus.num_queries, embedder.dimension)))
    model = AutoModel.from_pretrained(small_model).eval()
    rows = [row for row in range(len(pairs)) if corpus.query_source[corpus.query_of_row[row]] == row][:48]
    assert {pairs.query_head(row) for row in rows} == {None, "find reed 0; ", "find reed 1; "}
    for row in rows:
        (ids,), _ = pairs.tokens([row])
        with torch.no_grad():
            want = model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, -1]
        assert torch.cosine_similarity(want, got[corpus.query_of_row[row]], dim=0) == pytest.approx(1, abs=1e-6)


def test_rules_are_changed_without_encoding_again(prepared: Path, tmp_path: Path) -> None:
    store, _ = mined(prepared, tmp_path / "store", Rules())
    before = (tmp_path / "store/documents.f32").stat().st_mtime_ns, store.result(0).read_bytes()
    mined(prepared, tmp_path / "store", replace(Rules(), num_negatives=2))
    assert (tmp_path / "store/documents.f32").stat().st_mtime_ns == before[0]
    assert store.result(0).read_bytes() != before[1]
    mined(prepared, tmp_path / "store", Rules())
    assert store.result(0).read_bytes() == before[1]


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = mined(prepared, tmp_path / "whole", RULES[1])
    (tmp_path / "rules.json").write_text(json.dumps(asdict(RULES[1])))
    command = [sys.executable, str(Path(__file__).with_name("mine_worker.py")), str(prepared), str(tmp_path / "killed")]
    command += [str(tmp_path / "rules.json")]
    generator, killed = random.Random(1), 0
    for _ in range(30):
        process = subprocess.Popen(command)
        while not (tmp_path / "killed").exists() and process.poll() is None:
            time.sleep(0.01)  # its imports are over
        time.sleep(generator.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if killed == 3:
            break
    assert killed
    subprocess.run(command, check=True)
    for path in sorted(whole.folder.iterdir()):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name


class CrossEncoderOfLengths:
    """Scores that tell pairs apart, and are not in the order of cosines."""

    def predict(self, pairs: list[tuple[str, str]], show_progress_bar: bool) -> np.ndarray:
        return np.array([self.of(*pair) for pair in pairs])

    @staticmethod
    def of(query: str, document: str) -> float:
        return float(zlib.crc32(f"{query}|{document}".encode()) % 1000)


def test_a_cross_encoders_scores_stand_beside_the_cosines(prepared: Path, small_model: Path, tmp_path: Path) -> None:
    rules = Rules(num_negatives=3, relative_margin=None)
    store, corpus = mined(prepared, tmp_path / "store", rules)
    mine.score(corpus, CrossEncoderOfLengths(), store, mine.Place())
    done = store.result(0, mine.CROSS_ENCODER).stat().st_mtime_ns
    mine.score(corpus, CrossEncoderOfLengths(), store, mine.Place())
    assert store.result(0, mine.CROSS_ENCODER).stat().st_mtime_ns == done, "scored chunks are not scored again"
    job = Mining(str(prepared), small_model, tmp_path / "out", rules, work_dir=store.folder, cross_encoder="lengths")
    finish(job, store, corpus)
    got, source = PreparedPairs.open(tmp_path / "out"), PreparedPairs.open(prepared)
    cosines = list(mine.records(mine.results(store, corpus), corpus, range(len(source))))
    assert len(got) == len(source)
    for row, record in enumerate(cosines):
        query, positive, _ = source.texts(row)
        assert got.cell(row, "anchor") == source.cell(row, "anchor") and got.texts(row)[:2] == (query, positive)
        assert got.cell(row, "positive_score") == pytest.approx(record["positive_score"])
        assert got.cell(row, "negative_scores") == pytest.approx(record["negative_scores"])
        negatives = got.cell(row, "negatives")
        want = [CrossEncoderOfLengths.of(query, document) for document in negatives]
        assert got.cell(row, "cross_encoder_negative_scores") == want and len(want) == 3
        assert got.cell(row, "cross_encoder_positive_score") == CrossEncoderOfLengths.of(query, positive)
    page = (tmp_path / "out" / "mining.html").read_text()
    assert page.count("<th>cross-encoder</th>") == 20
    assert "num_negatives" in page and ">null<" not in page  # rules that are not set are left out


def real_oracle(
    pairs: PreparedPairs, documents: list[str], vectors: tuple[np.ndarray, np.ndarray], rules: Rules
) -> Iterator[tuple[list[str], list[float]]]:
    """Negatives and their scores of every row by the definition, from the vectors of (queries of rows, documents)."""
    left, right = (side.astype(np.float64) for side in vectors)
    texts = [same(document) for document in documents]
    number = {document: place for place, document in enumerate(texts)}
    rows_of_query: dict[str, list[int]] = {}
    for row in range(len(pairs)):
        rows_of_query.setdefault(same(pairs.texts(row)[0]), []).append(row)
    positive_of_row = [number[same(pairs.texts(row)[1])] for row in range(len(pairs))]
    norms, short = np.sqrt((right * right).sum(1)), np.array([len(text) < rules.min_characters for text in texts])
    for row in range(len(pairs)):
        query, positive = same(pairs.texts(row)[0]), positive_of_row[row]
        scores = (right * left[row]).sum(1) / np.maximum(norms * np.sqrt((left[row] * left[row]).sum()), 1e-12)
        known = {positive_of_row[other] for other in rows_of_query[query]}
        possible = ~short
        possible[[*known, *([number[query]] if query in number else [])]] = False
        order = np.lexsort((np.arange(len(texts)), -scores))
        window = order[possible[order]][rules.range_min : rules.range_max]
        highest = min(
            rules.max_score, scores[positive] - rules.absolute_margin,
            scores[positive] - rules.relative_margin * abs(scores[positive]),
        )  # fmt: skip
        within = [at for at in window if rules.min_score <= scores[at] <= highest]
        taken = []
        for at in within:
            if len(taken) < rules.num_negatives and not any(near(texts[at], texts[p]) for p in known):
                taken.append(at)
        yield [documents[at] for at in taken], [float(scores[at]) for at in taken]


def mine_in_a_child(job: Mining, kill_at: int | None = None, delay: float = 0.0) -> bool:
    """Mine in a forked process, which need not import torch again. Whether it was killed: `delay` seconds after it had
    left `kill_at` files."""
    child = os.fork()
    if child == 0:
        try:
            finish(job, *mine_rank(job, 0, 1, 0))
        finally:
            os._exit(0 if (job.out / "mining.html").exists() else 1)
    ended, status = os.waitpid(child, 0 if kill_at is None else os.WNOHANG)
    while not ended:
        if len(list(job.out.parent.rglob("*"))) >= kill_at:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            kill_at = sys.maxsize
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data/pairs/train_ko_en").is_dir(), reason="the real pairs are not here")
def test_real_rows_are_the_oracles_and_ten_kills_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9,827 Korean and English rows, a random Qwen3 with the real vocabulary, every rule on."""
    monkeypatch.setattr(mine, "TEXTS_A_CHUNK", 512)  # so that little is lost at each kill
    monkeypatch.chdir(tmp_path)
    make = [sys.executable, str(SHARED / "make_tiny_model.py"), "model", "--hidden", "32", "--layers", "1"]
    subprocess.run(make, check=True)
    prepare([str(SHARED / "data/pairs/train_ko_en")], "pairs", tokenizer="model", max_seq_length=128)
    pairs = PreparedPairs.open("pairs")
    Path("whole").mkdir()
    Path("killed").mkdir()
    job = Mining("pairs", Path("model"), Path("whole/mined"), Rules(), work_dir=Path("whole/work"))
    store, corpus = mine_rank(job, 0, 1, 0)
    vectors = [np.array(store.vectors(name, num, 32)) for name, num in
               (("queries", corpus.num_queries), ("documents", corpus.num_documents))]  # fmt: skip
    scores = mine.results(store, corpus).positive_scores
    rules = Rules(
        num_negatives=7, range_min=2, range_max=60, min_score=float(np.quantile(scores, 0.1)),
        max_score=float(np.quantile(scores, 0.95)), absolute_margin=-0.1, relative_margin=-0.2, min_characters=30,
    )  # fmt: skip
    job = replace(job, rules=rules)
    assert not mine_in_a_child(job)  # the embeddings are there
    documents = [corpus.document(at) for at in range(corpus.num_documents)]
    got = PreparedPairs.open("whole/mined")
    pairs_of_vectors = vectors[0][corpus.query_of_row], vectors[1]
    counts: Counter[int] = Counter()
    for row, (negatives, negative_scores) in enumerate(real_oracle(pairs, documents, pairs_of_vectors, rules)):
        assert got.cell(row, "negatives") == negatives, row
        assert got.list_cell("negative_scores", row, np.float32).tolist() == np.float32(negative_scores).tolist(), row
        counts[len(negatives)] += 1
    again = replace(job, out=Path("killed/mined"), work_dir=Path("killed/work"))
    generator = random.Random(1)
    moments = sorted(generator.sample(range(1, len(list(Path("whole/work").iterdir())) + 4), 10))
    killed = sum(mine_in_a_child(again, moment, generator.uniform(0, 0.5)) for moment in moments)
    assert killed == 10
    assert not mine_in_a_child(again)
    names = sorted(path.name for path in Path("whole/mined").glob("*.arrow")) + ["mining.html"]
    for name in names:
        assert Path("killed/mined", name).read_bytes() == Path("whole/mined", name).read_bytes(), name
    print(f"{len(pairs)} rows, {corpus.num_documents} documents; negatives a row {dict(sorted(counts.items()))}; "
          f"rejected {dict(mine.results(store, corpus).rejected)}; {killed} kills")  # fmt: skip


def anchor(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anchor_cli", "mine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_with_one_and_two_processes(prepared: Path, small_model: Path, tmp_path: Path) -> None:
    """Raw or prepared pairs, one process or two: the same folder, which Stage II and `datasets` read."""
    options = ["--model", small_model, "--relative-margin", "0.0", "--num-negatives", "3", "--corpus", prepared]
    done = anchor(prepared, "--out", tmp_path / "one", "--json", *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows"] == len(PreparedPairs.open(prepared)) == sum(summary["rows_with"].values())
    assert not (tmp_path / "one.mining").exists()
    if without := summary["rows_with"].get("0"):
        assert f"{without:,} rows have none; candidates were rejected most by relative_margin" in done.stderr
    assert "guessed" not in done.stderr and "instruction" not in done.stderr, "said when the pairs were prepared"
    two = anchor(prepared, "--out", tmp_path / "two", "--nproc-per-node", "2", *options)
    assert two.returncode == 0, two.stderr
    for name in [*sorted(path.name for path in (tmp_path / "one").glob("*.arrow")), "mining.html"]:
        first, second = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert first == second, name
    pairs, source = PreparedPairs.open(tmp_path / "one"), PreparedPairs.open(prepared)
    assert all((pairs.tokens([row])[0][0] == source.tokens([row])[0][0]).all() for row in range(len(source)))
    negatives = [pairs.cell(row, "negatives") for row in range(len(pairs))]
    assert sum(map(len, negatives)) == summary["negatives"] > 0
    assert all(text.strip() for texts in negatives for text in texts)
    again = anchor(prepared, "--out", tmp_path / "one", *options)
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--range-min", "9", "--range-max", "9"], "--range-min 9"),
        (["--relative-margin", "nan"], "--relative-margin nan: expected a finite number"),
        (["--corpus", "nowhere"], "nowhere"),
        (["--cross-encoder", "/"], "--cross-encoder /: cannot be loaded"),
    ],
)
def test_a_wrong_option_is_refused(
    prepared: Path, small_model: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = anchor(prepared, "--model", small_model, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
