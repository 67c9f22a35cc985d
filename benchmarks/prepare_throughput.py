"""How fast `anchor prepare` is, against the bare tokenizer on the same texts with the same number of processes.

    python benchmarks/prepare_throughput.py --rows 2000000 --tokenizer MODEL --pool SAVED_PAIRS --work-dir /tmp/bench

Synthesised rows are sentences drawn from the pool's own rows, Korean and English, to KURE's lengths (25 tokens a query
and 510 a document on average; `--document-share` makes documents shorter); a number makes each text its own.

Both go over the same .jsonl file at the same time, taking turns of some seconds: while one runs, all processes of the
other are stopped, so a machine that slows down on the way slows both. The baseline is `encode_batch` of the templated
texts and nothing else, which is what any preparation must do at least. Seconds are those of a side's own turns.
Memory is the largest sum over all processes of `anchor prepare` of their proportional set sizes (PSS: shared pages
count once), looked at every half second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from anchor_cli.base.contract import INSTRUCTION_KO
from anchor_cli.data.prepare.prepare import prepare
from anchor_cli.data.text import load_tokenizer

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
    """Baseline worker: every num_proc-th chunk of rows through bare `encode_batch`. Returns (rows, tokens)."""
    path, model, which, num_proc = task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(model)
    rows = tokens = 0
    for texts in _chunks(path, which, num_proc):
        for begin in range(0, len(texts), 128):
            encoded = tokenizer.encode_batch(texts[begin : begin + 128], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in encoded)
        rows += len(texts) // 2
    return rows, tokens


def _chunks(path: str, which: int, num_proc: int) -> Iterator[list[str]]:
    texts: list[str] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number // _CHUNK % num_proc != which:
                continue
            row = json.loads(line)
            texts.append(f"<|im_start|>user\n{INSTRUCTION_KO}; {row['anchor']}<|im_end|>")
            texts.append(f"<|im_start|>user\n{row['positive']}<|im_end|>")
            if len(texts) >= 2 * _CHUNK:
                yield texts
                texts = []
    if texts:
        yield texts


def baseline(path: Path, model: str, num_proc: int) -> dict[str, Any]:
    """All texts through the bare tokenizer in `num_proc` processes."""
    tasks = [(str(path), model, which, num_proc) for which in range(num_proc)]
    with get_context("spawn").Pool(num_proc) as workers:
        done = workers.map(_encode_file, tasks, chunksize=1)
        workers.close()
        workers.join()
    return {"rows": sum(rows for rows, _ in done), "tokens": sum(tokens for _, tokens in done)}


def prepared(path: Path, out: Path, model: str, num_proc: int) -> dict[str, Any]:
    """`anchor prepare` of the file in `num_proc` processes."""
    tally = prepare([str(path)], out, tokenizer=model, num_proc=num_proc).tally
    return {
        "rows": tally.num_in,
        "mean_tokens": {side: told["mean"] for side, told in tally.as_dict()["lengths"].items()},
        "rejected": dict(tally.rejected),
        "out_mb": sum(file.stat().st_size for file in out.iterdir()) / 1e6,
    }


class Side:
    """One of the two, in a process group of its own that can be stopped."""

    def __init__(self, name: str, work_dir: Path) -> None:
        self.name, self._out = name, work_dir / f"{name}.json"
        with open(self._out, "wb") as out:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
            self.process = subprocess.Popen(command, stdout=out, process_group=0)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.active_s = self.cpu_s = 0.0
        self.code: int | None = None

    def turn(self, seconds: float) -> None:
        """Let it run for so long, or to its end."""
        os.killpg(self.process.pid, signal.SIGCONT)
        began = time.monotonic()
        while time.monotonic() - began < seconds and self.code is None:
            time.sleep(0.02)
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.code, self.cpu_s = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        self.active_s += time.monotonic() - began
        if self.code is None:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def result(self) -> dict[str, Any]:
        if self.code:
            raise SystemExit(f"{self.name} ended with {self.code}")
        told: dict[str, Any] = json.loads(self._out.read_text())
        rates = {"rows_per_s": told["rows"] / self.active_s, "rows_per_cpu_s": told["rows"] / self.cpu_s}
        return told | {"seconds": self.active_s, "cpu_s": self.cpu_s} | rates


class MemoryWatch(threading.Thread):
    """The largest sum of a process's and its descendants' PSS, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self._pid, self._over = pid, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            self.samples.append(sum(_pss_mb(pid) for pid in _family(self._pid)))

    def result(self) -> dict[str, Any]:
        self._over.set()
        self.join()
        quarter = len(self.samples) // 4
        parts = [sorted(self.samples[at * quarter : (at + 1) * quarter]) for at in range(4)] if quarter else []
        return {"peak_mb": max(self.samples), "median_mb_by_quarter": [part[len(part) // 2] for part in parts]}


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


def take_turns(work_dir: Path, seconds: float) -> dict[str, Any]:
    """Both sides to their end, one running at a time."""
    sides = [Side("baseline", work_dir), Side("prepare", work_dir)]
    memory = MemoryWatch(sides[1].process.pid)
    memory.start()
    try:
        while any(side.code is None for side in sides):
            for side in sides:
                if side.code is None:
                    side.turn(seconds)
    finally:
        for side in sides:
            if side.code is None:
                os.killpg(side.process.pid, signal.SIGKILL)
    bare, ours = (side.result() for side in sides)
    return {
        "bare_tokenizer": bare,
        "prepare": ours | memory.result(),
        "share_of_bare": ours["rows_per_s"] / bare["rows_per_s"],
        "share_of_bare_by_cpu": ours["rows_per_cpu_s"] / bare["rows_per_cpu_s"],
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
    parser.add_argument("--turn", type=float, default=10.0, help="seconds one side runs before the other")
    parser.add_argument("--side", choices=("baseline", "prepare"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rows, out = asked.work_dir / "rows.jsonl", asked.work_dir / "prepared"
    if asked.side == "baseline":
        print(json.dumps(baseline(rows, asked.tokenizer, asked.num_proc)))
        return
    if asked.side == "prepare":
        print(json.dumps(prepared(rows, out, asked.tokenizer, asked.num_proc)))
        return
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    write_rows(rows, asked.rows, pool_texts(asked.pool), asked.document_share)
    print(f"{rows}: {rows.stat().st_size / 1e6:,.0f} MB", file=sys.stderr)
    load = {"load_average_before": os.getloadavg()[0]}
    result = {"num_proc": asked.num_proc, **load, **take_turns(asked.work_dir, asked.turn)}
    print(json.dumps(result | {"load_average_after": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
