"""Mining against a float64 loop over everything, written out here; whatever kills it, it gives the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from mine_worker import BagOfWords, mined

from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import prepare
from anchor_cli.mine import mine
from anchor_cli.mine.select import Rules

WORDS = "otter river lake boat stone wind reed frog heron moss 수달 강 호수 바람 갈대 이끼".split()


def text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


def rows(seed: int, num: int) -> list[dict[str, str]]:
    """Queries that come several times, positives that come several times, near-duplicates, short ones, the query as a
    document."""
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
    first_query = {same(query): query for query, _, _ in reversed(table)}
    model = BagOfWords()
    right = model.encode_documents([spelled[x] for x in documents], "").astype(np.float64)
    out = []
    for row, (query, document, _) in enumerate(table):
        left = model.encode_queries([first_query[same(query)]], "")[0].astype(np.float64)
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
    got, rejected = mine.results(store, corpus)
    assert [one.row for one in got] == list(range(len(want)))
    for record, (negatives, positive, scores) in zip(mine.records(got, corpus), want, strict=True):
        assert record["negatives"] == negatives
        assert record["positive_score"] == positive and record["negative_scores"] == scores
    lengths = Counter(len(negatives) for negatives, _, _ in want)
    assert len(lengths) > 1 or rules.relative_margin is None, "rows have different numbers of negatives"
    assert rejected["known_positive"] and rejected["query_itself"] and rejected["near_duplicate"]


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
    two = anchor(prepared, "--out", tmp_path / "two", "--nproc-per-node", "2", *options)
    assert two.returncode == 0, two.stderr
    for name in [*sorted(path.name for path in (tmp_path / "one").glob("*.arrow")), "mining.html"]:
        first, second = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert first == second, name
    pairs = PreparedPairs.open(tmp_path / "one")
    negatives = [pairs.cell(row, "negatives") for row in range(len(pairs))]
    assert sum(map(len, negatives)) == summary["negatives"] > 0
    assert all(text.strip() for texts in negatives for text in texts)
    again = anchor(prepared, "--out", tmp_path / "one", *options)
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--range-min", "9", "--range-max", "9"], "--range-min 9"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_option_is_refused(
    prepared: Path, small_model: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = anchor(prepared, "--model", small_model, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
