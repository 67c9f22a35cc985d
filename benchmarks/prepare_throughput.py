"""How fast `anchor prepare` is, against the bare tokenizer on the same texts with the same number of processes.

    python benchmarks/prepare_throughput.py --rows 2000000 --tokenizer MODEL --pool SAVED_PAIRS --work-dir /tmp/bench

Synthesised rows are sentences drawn from the pool's own rows, Korean and English, to KURE's lengths (25 tokens a query
and 510 a document on average; `--document-share` makes documents shorter); a number makes each text its own. They are
tokenised without anything else (the baseline: `encode_batch`, which is what any preparation must do at least), every
text once: half of the chunks before and the other half after `anchor prepare` goes over the same .jsonl file, so that
a machine that slows down on the way slows both. Rates are told by the clock and by processor seconds; the latter hold
on a busy machine too. Memory is the largest sum over all processes of their proportional set sizes
(PSS: shared pages count once), looked at every half second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from anchor_cli.data.prepare import prepare
from anchor_cli.data.text import load_tokenizer
from anchor_cli.words.contract import INSTRUCTION_KO

_CHUNK = 512


def pool_texts(folder: str) -> tuple[list[str], list[str]]:
    """(queries, pieces of documents) of a `save_to_disk` folder."""
    import datasets

    rows = datasets.load_from_disk(folder)
    pieces = [piece for text in rows["positive"] for piece in text.replace("\n", " ").split(". ") if piece.strip()]
    return list(rows["anchor"]), pieces


def synthesise(num: int, pool: tuple[list[str], list[str]], share: float, characters: int) -> Iterator[dict[str, str]]:
    """`num` rows, the same for the same arguments; documents of `characters` on average, long-tailed."""
    queries, pieces = pool
    rng = random.Random(0)
    for index in range(num):
        wanted = min(rng.lognormvariate(-0.28, 0.75), 8.0) * characters * share  # mean 1.0, median 0.76: 381 of 510
        document, length = [], 0
        while length < wanted:
            document.append(rng.choice(pieces))
            length += len(document[-1]) + 2
        text = ". ".join(document)[: max(int(wanted), 40)]
        yield {"anchor": f"{rng.choice(queries)} {index}", "positive": f"{text} {index}"}


def write_rows(path: Path, num: int, pool: tuple[list[str], list[str]], share: float) -> None:
    """The rows as .jsonl, about 1.7 KB each."""
    with open(path, "w", encoding="utf-8") as file:
        for row in synthesise(num, pool, share, 860):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _encode_file(task: tuple[str, str, int, int]) -> tuple[int, int]:
    """Baseline worker: every `of`-th chunk of rows through bare `encode_batch`. Returns (rows, tokens)."""
    path, model, which, of = task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(model)
    rows = tokens = 0
    for texts in _chunks(path, which, of):
        for begin in range(0, len(texts), 128):
            encoded = tokenizer.encode_batch(texts[begin : begin + 128], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in encoded)
        rows += len(texts) // 2
    return rows, tokens


def _chunks(path: str, which: int, of: int) -> Iterator[list[str]]:
    texts: list[str] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number // _CHUNK % of != which:
                continue
            row = json.loads(line)
            texts.append(f"<|im_start|>user\n{INSTRUCTION_KO}; {row['anchor']}<|im_end|>")
            texts.append(f"<|im_start|>user\n{row['positive']}<|im_end|>")
            if len(texts) >= 2 * _CHUNK:
                yield texts
                texts = []
    if texts:
        yield texts


def baseline(path: Path, model: str, num_proc: int, half: int) -> dict[str, Any]:
    """Time of the bare tokenizer over the even (0) or odd (1) chunks, loading it included, as preparation's is."""
    started, cpu = time.monotonic(), processor_s()
    tasks = [(str(path), model, half + 2 * which, 2 * num_proc) for which in range(num_proc)]
    with get_context("spawn").Pool(num_proc) as workers:
        done = workers.map(_encode_file, tasks, chunksize=1)
        workers.close()
        workers.join()
    rows, tokens = sum(rows for rows, _ in done), sum(tokens for _, tokens in done)
    return rates(rows, time.monotonic() - started, processor_s() - cpu) | {"tokens": tokens}


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rates(rows: int, seconds: float, cpu: float) -> dict[str, Any]:
    """By the clock and by processor seconds."""
    return {"rows": rows, "seconds": seconds, "rows_per_s": rows / seconds, "cpu_s": cpu, "rows_per_cpu_s": rows / cpu}


class MemoryWatch(threading.Thread):
    """The largest sum of this process's and its descendants' PSS, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb, self._over = 0.0, threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(0.5):
            mb = sum(_pss_mb(pid) for pid in _family(os.getpid()))
            self.peak_mb = max(self.peak_mb, mb)
            self.samples.append((time.monotonic() - started, mb))

    def stop(self) -> None:
        self._over.set()
        self.join()


def _family(pid: int) -> list[int]:
    try:
        told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [pid, *(member for child in told.split() for member in _family(int(child)))]


def _pss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def prepared(path: Path, out: Path, model: str, num_proc: int) -> dict[str, Any]:
    """Wall-clock time, rate and peak memory of `anchor prepare`."""
    watch = MemoryWatch()
    watch.start()
    cpu = processor_s()
    summary = prepare([str(path)], out, tokenizer=model, num_proc=num_proc)
    watch.stop()
    tally = summary.tally
    quarter = len(watch.samples) // 4
    return rates(tally.num_in, summary.seconds, processor_s() - cpu) | {
        "peak_mb": watch.peak_mb,
        "median_mb_by_quarter": [
            sorted(mb for _, mb in watch.samples[at * quarter : (at + 1) * quarter])[quarter // 2] for at in range(4)
        ]
        if quarter
        else [],
        "mean_tokens": {side: told["mean"] for side, told in tally.as_dict()["lengths"].items()},
        "rejected": dict(tally.rejected),
        "out_mb": sum(file.stat().st_size for file in out.iterdir()) / 1e6,
    }


def main() -> None:
    """Print the figures as JSON; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pool", required=True, help="a save_to_disk folder with anchor and positive")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-proc", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--document-share", type=float, default=1.0, help="of KURE's document length")
    asked = parser.parse_args()
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    rows, out = asked.work_dir / "rows.jsonl", asked.work_dir / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    pool = pool_texts(asked.pool)
    write_rows(rows, asked.rows, pool, asked.document_share)
    print(f"{rows}: {rows.stat().st_size / 1e6:,.0f} MB", file=sys.stderr)
    result: dict[str, Any] = {"num_proc": asked.num_proc, "load_average_before": os.getloadavg()[0]}
    before = baseline(rows, asked.tokenizer, asked.num_proc, 0)
    print(json.dumps(before), file=sys.stderr)
    result["prepare"] = prepared(rows, out, asked.tokenizer, asked.num_proc)
    print(json.dumps(result["prepare"]), file=sys.stderr)
    after = baseline(rows, asked.tokenizer, asked.num_proc, 1)
    result |= {"bare_tokenizer_before": before, "bare_tokenizer_after": after}
    for rate, time_of in (("rows_per_s", "seconds"), ("rows_per_cpu_s", "cpu_s")):
        bare = asked.rows / (before[time_of] + after[time_of])
        result[f"share_of_bare_{rate}"] = result["prepare"][rate] / bare
    result["load_average_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
