"""`anchor mine` at scale: memory, growth with the rows, and its search beside faiss's, on synthetic vectors.

    python benchmarks/mine_scale.py whole  [--rows 1000000] [--dimension 64] [--minutes 60] [--store DIR]
    python benchmarks/mine_scale.py growth [--rows 25000 50000 100000 200000 400000] [--queries 4096]
    python benchmarks/mine_scale.py faiss  --faiss-python PYTHON [--rows 100000] [--queries 2048] [--dimension 64 1024]

`whole` runs everything of `anchor mine` but the model and the tokenizer: numbering the texts, vectors into the store,
exact search, rules, the mined rows. Each stage prints its seconds and the process's peak so far (VmHWM: mapped files
count, too). It stops after `--minutes`, and the same command goes on where it stopped; `--queries` ends it early.
`growth` does the same in a process of its own for each number of rows, with some of the queries: CPU time for all of
them is that a query times the rows.
`faiss` times `IndexFlatIP` (faiss-cpu in another environment's PYTHON) and our search in turns: same unit vectors, same
number of threads, and the ids compared; where they differ, the float64 cosines say whose order is right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from scaling import peak_gb  # noqa: E402

Float32Array = npt.NDArray[np.float32]
FAISS = """
import json, sys, time
import faiss, numpy as np
folder, k, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
faiss.omp_set_num_threads(threads)
queries, documents = np.load(f"{folder}/queries.npy"), np.load(f"{folder}/documents.npy")
index = faiss.IndexFlatIP(documents.shape[1])
index.add(documents)
wall, cpu = time.perf_counter(), time.process_time()
_, ids = index.search(queries, k)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
np.save(f"{folder}/faiss.npy", ids)
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "version": faiss.__version__}))
"""


class SyntheticPairs:
    """Rows of made-up texts, each distinct: what mining asks of prepared pairs."""

    fingerprint, contract = "synthetic", SimpleNamespace(training_instructions={"*": "instruction"})

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def query_head(self, row: int) -> None:
        return None

    def language(self, row: int) -> str:
        return "ko"

    def cell(self, row: int, name: str) -> str:
        return self.texts(row)[("anchor", "positive").index(name)]

    def texts(self, row: int) -> tuple[str, str, str]:
        return f"query {row}", f"document {row}: {row * 2654435761 % 2**32:032b} some more of its text", "ko"


class SyntheticEmbedder:
    """Unit vectors by text: a document is near its query, all others are noise."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode_documents(self, texts: Sequence[str], prompt: str) -> Float32Array:
        return self._encode([int(text.split(" ", 1)[1].split(":")[0]) for text in texts], 1)

    def encode_training_queries(self, texts: Sequence[str], prefix: str, language: str) -> Float32Array:
        return self._encode([int(text.split(" ")[1]) for text in texts], 2)

    def _encode(self, rows: list[int], side: int) -> Float32Array:
        own = np.stack([np.random.default_rng([0, row]).standard_normal(self.dimension) for row in rows])
        noise = np.random.default_rng([side, rows[0]]).standard_normal(own.shape)
        return (own + 0.8 * noise).astype(np.float32)


def whole(args: argparse.Namespace) -> None:
    from anchor_cli.mine import mine
    from anchor_cli.mine.corpus import corpus_of
    from anchor_cli.mine.select import Rules

    pairs, embedder = SyntheticPairs(args.rows[0]), SyntheticEmbedder(args.dimension[0])
    found: dict[str, float] = {"rows": len(pairs), "started_gb": peak_gb()}

    def stage(name: str, started: tuple[float, float]) -> None:
        found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - started[0], time.process_time() - started[1]
        found[f"{name}_gb"] = peak_gb()
        print(f"{name:>8}  {found[f'{name}_s']:9.1f} s  {found[f'{name}_cpu_s']:9.1f} s CPU  "
              f"peak {found[f'{name}_gb']:.3f} GB", file=sys.stderr, flush=True)  # fmt: skip

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    began = now()
    corpus = corpus_of(pairs)  # type: ignore[arg-type]
    stage("number", began)
    store = mine.begin(args.store, mine.plan_of({"rows": len(pairs), "dimension": embedder.dimension}, Rules()))
    began = now()
    mine.encode(corpus, embedder, store, mine.Place())  # type: ignore[arg-type]
    stage("encode", began)
    chunks = math.ceil(corpus.num_queries / mine.QUERIES_A_CHUNK)
    wanted = math.ceil((args.queries or corpus.num_queries) / mine.QUERIES_A_CHUNK)
    before = _done(store, chunks)
    deadline = threading.Event()
    timer = threading.Timer(60 * args.minutes, deadline.set)
    timer.daemon = True
    timer.start()
    mine.Store.write_result = _stopping(mine.Store.write_result, deadline, wanted - before)  # type: ignore[method-assign]
    began = now()
    with contextlib.suppress(_Stop):
        mine.search(corpus, embedder.dimension, store, Rules(), mine.Place())
    stage("search", began)
    found |= {"queries": min(corpus.num_queries, _done(store, chunks) * mine.QUERIES_A_CHUNK),
              "queries_now": (_done(store, chunks) - before) * mine.QUERIES_A_CHUNK}  # fmt: skip
    if _done(store, chunks) == chunks:
        began = now()
        num_records = sum(1 for _ in mine.records(mine.results(store, corpus), corpus, range(len(pairs))))
        stage("write", began)
        assert num_records == len(pairs)
    print(json.dumps(found), flush=True)


class _Stop(Exception):
    """The time or the queries of this measurement are over."""


def _stopping(write, deadline: threading.Event, left: int):  # type: ignore[no-untyped-def]
    state = {"left": left}

    def stopping(store, chunk, arrays):  # type: ignore[no-untyped-def]
        write(store, chunk, arrays)
        state["left"] -= 1
        if deadline.is_set() or state["left"] <= 0:
            raise _Stop

    return stopping


def _done(store, chunks: int) -> int:  # type: ignore[no-untyped-def]
    return sum(store.result(chunk).exists() for chunk in range(chunks))


def growth(args: argparse.Namespace) -> None:
    found = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "whole", "--rows", str(rows), "--store", f"{scratch}/store"]
            command += ["--dimension", str(args.dimension[0]), "--queries", str(args.queries or 4096)]
            one = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        one["all_s"] = one["search_cpu_s"] * rows / one["queries_now"]
        found.append(one)
        peak = max(value for name, value in one.items() if name.endswith("_gb"))
        a_query = 1e3 * one["all_s"] / rows
        print(f"{rows:>9,} rows  {a_query:6.2f} ms of CPU time a query, {one['all_s']:9.1f} s for all of them  "
              f"peak {peak:.3f} GB", flush=True)  # fmt: skip
    for one, other in zip(found, found[1:], strict=False):
        exponent = math.log(other["all_s"] / one["all_s"]) / math.log(other["rows"] / one["rows"])
        print(
            f"{one['rows']:,} to {other['rows']:,} rows: the search of all queries grows as rows to the {exponent:.2f}"
        )


def faiss(args: argparse.Namespace) -> None:
    import torch

    from anchor_cli.mine.search import cosines, nearest

    torch.set_num_threads(args.threads)
    queries_wanted = args.queries or 2048
    for dimension in args.dimension:
        chance = np.random.default_rng(0)
        queries, documents = (
            chance.standard_normal((num, dimension), np.float32) for num in (queries_wanted, args.rows[0])
        )
        for side in (queries, documents):
            side /= np.linalg.norm(side, axis=1, keepdims=True)
        seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "faiss": []}
        with tempfile.TemporaryDirectory() as scratch:
            np.save(f"{scratch}/queries.npy", queries)
            np.save(f"{scratch}/documents.npy", documents)
            for _ in range(args.repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                ours = np.concatenate([block.documents for block in nearest(queries, documents, args.k)])
                seconds["ours"].append((time.perf_counter() - wall, time.process_time() - cpu))
                command = [args.faiss_python, "-c", FAISS, scratch, str(args.k), str(args.threads)]
                answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
                seconds["faiss"].append((answer["wall_s"], answer["cpu_s"]))
            theirs = np.load(f"{scratch}/faiss.npy")
        different = np.flatnonzero((ours != theirs).any(axis=1))
        wrong = worst = 0.0
        for query in different:
            left, right = (cosines(queries[query], documents[ids[query]]) for ids in (ours, theirs))
            worst = max(worst, float(np.abs(left - right).max()))
            wrong += bool((left < np.sort(right)[::-1]).any() or (np.diff(left) > 0).any())
        print(f"{queries_wanted:,} queries x {args.rows[0]:,} documents x {dimension} dimensions, nearest {args.k}, "
              f"{args.threads} thread(s), torch {torch.__version__}, faiss {answer['version']}")  # fmt: skip
        for name, runs in seconds.items():
            rates = sorted(queries_wanted / cpu for _, cpu in runs)
            walls = ", ".join(f"{wall:.1f}" for wall, _ in runs)
            print(f"  {name:>5}  {rates[len(rates) // 2]:8.1f} queries/s of CPU time (wall {walls} s)", flush=True)
        print(f"  ids the same in every place: {queries_wanted - len(different):,} of {queries_wanted:,} queries; in "
              f"the others cosines differ by at most {worst:.1e}, and ours is not the float64 order in {wrong:.0f}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("whole", "growth", "faiss"))
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--dimension", type=int, nargs="+", default=[64])
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "anchor-mine-scale")
    parser.add_argument("--faiss-python", default=sys.executable)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    usual = {"whole": [1_000_000], "growth": [25_000, 50_000, 100_000, 200_000, 400_000], "faiss": [100_000]}
    args.rows = args.rows or usual[args.what]
    {"whole": whole, "growth": growth, "faiss": faiss}[args.what](args)


if __name__ == "__main__":
    main()
