"""`anchor mine`: hard negatives of prepared pairs by a model's own ranking.

    texts     distinct queries and documents are numbered                          corpus
    encode    every text once, in chunks that stay on the disk                     store
    search    the exact nearest documents of every query, a chunk at a time        search
    choose    which of them are negatives of each row                              select
    score     positives and negatives by a cross-encoder, where one is named

Chunks are shared out over the ranks of the launcher by their number, and a chunk that is on the disk is never made
again: a mining that was killed goes on, on any number of ranks, and gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anchor_cli.base.files import write_json
from anchor_cli.data.text import canonical
from anchor_cli.evaluate.search import check_finite
from anchor_cli.mine.corpus import Corpus
from anchor_cli.mine.search import QUERIES_A_BLOCK, cosines, nearest_of_block
from anchor_cli.mine.select import Rules, choose, is_near_duplicate
from anchor_cli.mine.store import PLAN, Store, chunks_of, claim, share_out

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

    from anchor_cli.evaluate.embedder import Embedder

TEXTS_A_CHUNK = 4096
QUERIES_A_CHUNK = QUERIES_A_BLOCK
CROSS_ENCODER = "cross_encoder"


class Mined(NamedTuple):
    """The negatives of one row."""

    row: int
    negatives: list[int]
    """Documents of the corpus, best first."""
    positive_score: float
    negative_scores: list[float]


@dataclass(frozen=True)
class MinedRows:
    """The negatives of all rows, in the order of rows: R rows, M negatives."""

    first: npt.NDArray[np.int64]
    """(R + 1,) row i's negatives are first[i] … first[i + 1] - 1."""
    negatives: npt.NDArray[np.int64]
    """(M,) documents of the corpus, each row's best first."""
    positive_scores: npt.NDArray[np.float64]  # (R,)
    negative_scores: npt.NDArray[np.float64]  # (M,)
    rejected: Counter[str]
    """Candidates by reason."""
    cross_encoder: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
    """(R,) and (M,) a cross-encoder's scores."""

    def __len__(self) -> int:
        return len(self.positive_scores)


@dataclass(frozen=True)
class Place:
    """This process among the ranks that mine together, and its device."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


def plan_of(identity: dict[str, Any], rules: Rules, cross_encoder: str | None = None) -> dict[str, Any]:
    """What a mining depends on, stage by stage, as JSON keeps it: `identity` is that of the embeddings."""
    plan = {"embeddings": identity, "rules": asdict(rules), "cross_encoder": cross_encoder}
    return json.loads(json.dumps(plan))  # type: ignore[no-any-return]


def begin(folder: Path, plan: dict[str, Any]) -> Store:
    """The store of this mining, with what an interrupted one has left: embeddings of the same texts and model,
    negatives under the same rules, scores of the same cross-encoder. Called by rank 0 before the others look."""
    claim(folder)
    path, store = folder / PLAN, Store(folder)
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("embeddings") != plan["embeddings"]:
        store.clear()
    same_rules = before.get("rules") == plan["rules"]
    stale = [] if same_rules else list(folder.glob("negatives-*.npz"))  # embeddings stay
    if not same_rules or before.get("cross_encoder") != plan["cross_encoder"]:
        stale += folder.glob("cross_encoder-*.npz")
    for result in stale:
        result.unlink()
    write_json(path, plan)
    return store


def has_begun(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether rank 0 has made the store ready for this very mining."""
    try:
        return bool(json.loads((folder / PLAN).read_text(encoding="utf-8")) == plan)
    except (OSError, ValueError):
        return False


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
            alike: dict[tuple[str, str], list[int]] = {}
            queries = [corpus.query(number) for number in numbers]
            for at, (_, *prefix_and_language) in enumerate(queries):
                alike.setdefault((prefix_and_language[0], prefix_and_language[1]), []).append(at)
            for (prefix, language), places in sorted(alike.items()):
                encoded = embedder.encode_training_queries([queries[at][0] for at in places], prefix, language)
                vectors[np.array(places) + numbers.start] = encoded
        check_finite(vectors[numbers.start : numbers.stop], f"{name} from number {numbers.start}")
        vectors.flush()  # type: ignore[attr-defined]
        store.mark_done(name, chunk)

    share_out(f"encode {name}", chunks, lambda chunk: store.is_done(name, chunk), work, place.rank, place.world_size)


def search(corpus: Corpus, dimension: int, store: Store, rules: Rules, place: Place) -> None:
    """Find and choose the negatives of every row: this rank's chunks of queries, then wait for the others'."""
    queries = store.vectors("queries", corpus.num_queries, dimension)
    documents = store.vectors("documents", corpus.num_documents, dimension)
    chunks = chunks_of(corpus.num_queries, QUERIES_A_CHUNK)

    def work(chunk: int) -> None:
        store.write_result(chunk, _mine_chunk(corpus, queries, documents, chunks[chunk], rules, place.device))

    share_out("search", chunks, lambda chunk: store.result(chunk).exists(), work, place.rank, place.world_size)


def score(corpus: Corpus, cross_encoder: CrossEncoder, store: Store, place: Place) -> None:
    """A cross-encoder's scores of every row's positive and negatives: this rank's chunks, then wait for the others'."""

    def work(chunk: int) -> None:
        with np.load(store.result(chunk)) as arrays:
            rows, counts, negatives = (arrays[name] for name in ("rows", "counts", "negatives"))
        pairs = [corpus.pairs.texts(row)[:2] for row in rows.tolist()]
        of_negatives = np.repeat(np.arange(len(rows)), counts).tolist()
        pairs += [(pairs[at][0], corpus.document(of)) for at, of in zip(of_negatives, negatives.tolist(), strict=True)]
        scores = np.asarray(cross_encoder.predict(pairs, show_progress_bar=False), dtype=np.float64)
        store.write_result(chunk, {"positive": scores[: len(rows)], "negative": scores[len(rows) :]}, CROSS_ENCODER)

    chunks = chunks_of(corpus.num_queries, QUERIES_A_CHUNK)
    share_out(
        "score", chunks, lambda chunk: store.result(chunk, CROSS_ENCODER).exists(), work, place.rank, place.world_size
    )


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
                possible = np.cumsum(~np.logical_or.reduce(list(never.values())))  # (k,) candidates up to each place
                if possible[-1] < rules.range_max and wanted < corpus.num_documents:
                    short.append(query)
                    continue
                end = int(np.searchsorted(possible, rules.range_max)) + 1  # counts depend on the rules alone
                candidates, scores = candidates[:end], scores[:end]
                never = {reason: mask[:end] for reason, mask in never.items()}
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


def results(store: Store, corpus: Corpus) -> MinedRows:
    """The negatives of every row, in the order of rows, and their scores."""
    names = ("rows", "counts", "negatives", "positive_scores", "negative_scores")
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    rejected: Counter[str] = Counter()
    for chunk in range(len(chunks_of(corpus.num_queries, QUERIES_A_CHUNK))):
        with np.load(store.result(chunk)) as arrays:
            rejected.update(dict(zip(arrays["reasons"].tolist(), arrays["rejected"].tolist(), strict=True)))
            for name in names:
                parts.setdefault(name, []).append(arrays[name])
        if store.result(chunk, CROSS_ENCODER).exists():
            with np.load(store.result(chunk, CROSS_ENCODER)) as arrays:
                for name in ("positive", "negative"):
                    parts.setdefault(name, []).append(arrays[name])
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    order = np.argsort(columns["rows"])
    counts = columns["counts"][order]
    first = np.concatenate([[0], np.cumsum(counts)])
    starts = np.cumsum(columns["counts"]) - columns["counts"]  # of each row's negatives, as the chunks have them
    place = np.repeat(starts[order] - first[:-1], counts) + np.arange(first[-1])
    scores = (columns["positive"][order], columns["negative"][place]) if "positive" in columns else None
    return MinedRows(
        first,
        columns["negatives"][place],
        columns["positive_scores"][order],
        columns["negative_scores"][place],
        rejected,
        scores,
    )


def records(mined: MinedRows, corpus: Corpus, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Rows as `anchor prepare` reads them: query and positive as given, negatives best first, and all scores."""
    for row in rows:
        query, positive = (corpus.pairs.cell(row, name) for name in ("anchor", "positive"))
        own = slice(int(mined.first[row]), int(mined.first[row + 1]))
        record = {
            "anchor": query,
            "positive": positive,
            "language": corpus.pairs.language(row),
            "negatives": [corpus.document(number) for number in mined.negatives[own].tolist()],
            "positive_score": float(mined.positive_scores[row]),
            "negative_scores": mined.negative_scores[own].tolist(),
        }
        if mined.cross_encoder is not None:
            positives, negatives = mined.cross_encoder
            record["cross_encoder_positive_score"] = float(positives[row])
            record["cross_encoder_negative_scores"] = negatives[own].tolist()
        yield record
