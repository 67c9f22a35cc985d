"""`anchor mine`: hard negatives of prepared pairs by a model's own ranking.

    texts     distinct queries and documents are numbered                          corpus
    encode    every text once, in chunks that stay on the disk                     store
    search    the exact nearest documents of every query, a chunk at a time        search
    choose    which of them are negatives of each row                              select

Chunks are shared out over the ranks of the launcher by their number, and a chunk that is on the disk is never made
again: a mining that was killed goes on, on any number of ranks, and gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.console import progress
from anchor_cli.base.files import write_json
from anchor_cli.data.text import canonical
from anchor_cli.mine.corpus import Corpus
from anchor_cli.mine.search import QUERIES_A_BLOCK, cosines, nearest_of_block
from anchor_cli.mine.select import Rules, choose, is_near_duplicate
from anchor_cli.mine.store import Store, chunks_of, share_out

if TYPE_CHECKING:
    from anchor_cli.evaluate.embedder import Embedder

TEXTS_A_CHUNK = 4096
QUERIES_A_CHUNK = 4 * QUERIES_A_BLOCK
PLAN = "plan.json"


@dataclass(frozen=True)
class Mined:
    """The negatives of one row."""

    row: int
    negatives: list[int]
    """Documents of the corpus, best first."""
    positive_score: float
    negative_scores: list[float]


@dataclass(frozen=True)
class Place:
    """This process among the ranks that mine together, and its device."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


def begin(folder: Path, identity: dict[str, Any], rules: Rules) -> Store:
    """The store of this mining, with what an interrupted one has left: embeddings of the same texts and model, and
    negatives under the same rules. Called by rank 0 before the others look."""
    plan = {"embeddings": identity, "rules": asdict(rules)}
    path = folder / PLAN
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("embeddings") != identity:
        shutil.rmtree(folder, ignore_errors=True)
    elif before.get("rules") != plan["rules"]:  # embeddings stay
        for result in folder.glob("negatives-*.npz"):
            result.unlink()
    store = Store(folder)
    write_json(path, plan)
    return store


def has_begun(folder: Path, identity: dict[str, Any], rules: Rules) -> bool:
    """Whether rank 0 has made the store ready for this very mining."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(plan == json.loads(json.dumps({"embeddings": identity, "rules": asdict(rules)})))


def encode(corpus: Corpus, embedder: Embedder, store: Store, place: Place) -> None:
    """Embed every distinct text into the store: this rank's chunks, then wait for the others'."""
    _encode_side("documents", corpus.num_documents, corpus, embedder, store, place)
    _encode_side("queries", corpus.num_queries, corpus, embedder, store, place)


def _encode_side(name: str, num_texts: int, corpus: Corpus, embedder: Embedder, store: Store, place: Place) -> None:
    vectors = store.vectors(name, num_texts, embedder.dimension)
    chunks = chunks_of(num_texts, TEXTS_A_CHUNK)

    def work(chunk: int) -> None:
        numbers = chunks[chunk]
        if name == "documents":
            texts = [corpus.document(number) for number in numbers]
            vectors[numbers.start : numbers.stop] = embedder.encode_documents(texts, "")
        else:
            by_language: dict[str, list[int]] = {}
            queries = [corpus.query(number) for number in numbers]
            for place_, (_, language) in enumerate(queries):
                by_language.setdefault(language, []).append(place_)
            for language, places in sorted(by_language.items()):
                encoded = embedder.encode_queries([queries[at][0] for at in places], language)
                vectors[np.array(places) + numbers.start] = encoded
        vectors.flush()  # type: ignore[attr-defined]
        store.mark_done(name, chunk)

    with progress(f"encode {name}", num_texts, "texts") as bar:
        done = 0
        for finished in share_out(
            len(chunks), lambda chunk: store.is_done(name, chunk), work, place.rank, place.world_size
        ):
            bar.advance(min(finished * TEXTS_A_CHUNK, num_texts) - done)
            done = min(finished * TEXTS_A_CHUNK, num_texts)


def search(corpus: Corpus, dimension: int, store: Store, rules: Rules, place: Place) -> None:
    """Find and choose the negatives of every row: this rank's chunks of queries, then wait for the others'."""
    queries = store.vectors("queries", corpus.num_queries, dimension)
    documents = store.vectors("documents", corpus.num_documents, dimension)
    chunks = chunks_of(corpus.num_queries, QUERIES_A_CHUNK)

    def work(chunk: int) -> None:
        store.write_result(chunk, **_mine_chunk(corpus, queries, documents, chunks[chunk], rules, place.device))

    with progress("search", corpus.num_queries, "queries") as bar:
        done = 0
        for finished in share_out(
            len(chunks), lambda chunk: store.result(chunk).exists(), work, place.rank, place.world_size
        ):
            bar.advance(min(finished * QUERIES_A_CHUNK, corpus.num_queries) - done)
            done = min(finished * QUERIES_A_CHUNK, corpus.num_queries)


def _mine_chunk(
    corpus: Corpus,
    queries: npt.NDArray[np.float32],
    documents: npt.NDArray[np.float32],
    numbers: range,
    rules: Rules,
    device: str,
) -> dict[str, npt.NDArray[Any]]:
    """The negatives of every row of some queries, as arrays: rows, counts, negatives, scores, reasons."""
    rows: list[Mined] = []
    rejected: Counter[str] = Counter()
    for start in range(numbers.start, numbers.stop, QUERIES_A_BLOCK):
        todo = np.arange(start, min(start + QUERIES_A_BLOCK, numbers.stop))
        wanted = rules.range_max + 1 + max(len(corpus.positives_of(query)) for query in todo.tolist())
        while len(todo):  # again with more candidates where too many of them can never be negatives
            found = nearest_of_block(queries[todo], documents, wanted, device=device)
            short = []
            for query, candidates, scores in zip(todo.tolist(), found.documents, found.scores, strict=True):
                never = _never(corpus, query, candidates, rules)
                possible = len(candidates) - int(np.logical_or.reduce(list(never.values())).sum())
                if possible < rules.range_max and wanted < corpus.num_documents:
                    short.append(query)
                    continue
                rows += _rows_of_query(corpus, query, candidates, scores, never, queries, documents, rules, rejected)
            todo, wanted = np.array(short, np.int64), 4 * wanted
    rows.sort(key=lambda mined: mined.row)
    return {
        "rows": np.array([mined.row for mined in rows], np.int64),
        "counts": np.array([len(mined.negatives) for mined in rows], np.int64),
        "negatives": np.array([number for mined in rows for number in mined.negatives], np.int64),
        "positive_scores": np.array([mined.positive_score for mined in rows], np.float64),
        "negative_scores": np.array([score for mined in rows for score in mined.negative_scores], np.float64),
        "reasons": np.array(list(rejected), np.str_),
        "rejected": np.array(list(rejected.values()), np.int64),
    }


def _never(
    corpus: Corpus, query: int, candidates: npt.NDArray[np.int64], rules: Rules
) -> dict[str, npt.NDArray[np.bool_]]:
    """(k,) by reason, the candidates that can never be negatives of a query."""
    return {
        "known_positive": np.isin(candidates, corpus.positives_of(query)),
        "query_itself": corpus.document_keys[candidates] == corpus.query_keys[query],
        "too_short": corpus.document_characters[candidates] < rules.min_characters,
    }


def _rows_of_query(
    corpus: Corpus,
    query: int,
    candidates: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    never: dict[str, npt.NDArray[np.bool_]],
    queries: npt.NDArray[np.float32],
    documents: npt.NDArray[np.float32],
    rules: Rules,
    rejected: Counter[str],
) -> Iterator[Mined]:
    """The negatives of every row of one query, from its nearest documents (k,)."""
    texts = [canonical(corpus.document(int(number))) for number in corpus.positives_of(query)]
    answers: dict[int, bool] = {}

    def near_duplicate(document: int) -> bool:
        if document not in answers:
            answers[document] = is_near_duplicate(canonical(corpus.document(document)), texts)
        return answers[document]

    for row in corpus.rows_of(query):
        positive = float(cosines(queries[query], documents[corpus.document_of_row[row]][None])[0])
        taken = choose(int(row), candidates, scores, positive, rules, never, near_duplicate, rejected)
        yield Mined(int(row), candidates[taken].tolist(), positive, scores[taken].tolist())


def results(store: Store, corpus: Corpus) -> tuple[list[Mined], Counter[str]]:
    """The negatives of every row, in the order of rows, and the rejected candidates by reason."""
    mined: list[Mined] = []
    rejected: Counter[str] = Counter()
    for chunk in range(len(chunks_of(corpus.num_queries, QUERIES_A_CHUNK))):
        with np.load(store.result(chunk)) as arrays:
            rejected.update(dict(zip(arrays["reasons"].tolist(), arrays["rejected"].tolist(), strict=True)))
            ends = np.cumsum(arrays["counts"])
            negatives = np.split(arrays["negatives"], ends[:-1]) if len(ends) else []
            scores = np.split(arrays["negative_scores"], ends[:-1]) if len(ends) else []
            for row, numbers, positive, own in zip(
                arrays["rows"].tolist(), negatives, arrays["positive_scores"].tolist(), scores, strict=True
            ):
                mined.append(Mined(row, numbers.tolist(), positive, own.tolist()))
    mined.sort(key=lambda one: one.row)
    return mined, rejected


def records(mined: Sequence[Mined], corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Rows as `anchor prepare` reads them: texts, negatives best first, and the scores they were chosen by."""
    for one in mined:
        query, positive, language = corpus.pairs.texts(one.row)
        yield {
            "anchor": query,
            "positive": positive,
            "language": language,
            "negatives": [corpus.document(number) for number in one.negatives],
            "positive_score": one.positive_score,
            "negative_scores": one.negative_scores,
        }
