"""Earlier results of suites: the rankings of one model on one set, kept in `$ANCHOR_HOME/evaluations`.

The key is the model's files, the set's contents, the kind of device and the package's version. A checkpoint's files are
known by the checksums of its manifest, other models' by size and time. Metrics are computed anew from the rankings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from anchor_cli import __version__
from anchor_cli.base.checkpoints import MANIFEST
from anchor_cli.base.files import write_json
from anchor_cli.base.runs import anchor_home
from anchor_cli.data.benchmarks.beir import Benchmark

_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py")


def cache_file(model: Path, benchmark: Benchmark, device: str) -> Path:
    """Where the result of a model on a set is kept, whether it is there or not."""
    parts = [__version__, device.partition(":")[0], *_files_of(model), *_contents_of(benchmark)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return anchor_home() / "evaluations" / f"{digest.hexdigest()[:32]}.json"


def _files_of(model: Path) -> list[str]:
    try:
        files: dict[str, Any] = json.loads((model / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [f"{name} {entry['sha256']}" for name, entry in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError):
        paths = sorted(path for path in model.rglob("*") if path.suffix in _MODEL_FILES and path.is_file())
        states = [(path, path.stat()) for path in paths]
        return [f"{path.resolve()} {state.st_size} {state.st_mtime_ns}" for path, state in states]


def _contents_of(benchmark: Benchmark) -> list[str]:
    contents: list[Any] = [benchmark.language, benchmark.ignore_identical_ids]
    contents += [benchmark.queries, benchmark.corpus, benchmark.qrels]
    return [json.dumps(part, ensure_ascii=True) for part in contents]


def read_cached(file: Path) -> dict[str, Any] | None:
    """`query_ids`, `rankings`, `scores`, `health`; None when there are none."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {key: kept[key] for key in ("query_ids", "rankings", "scores", "health")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cached(file: Path, model: str, benchmark: Benchmark, kept: dict[str, Any]) -> None:
    """Keep a result. A home that cannot be written is no reason to fail: it is then computed again."""
    try:
        write_json(file, {"model": model, "benchmark": benchmark.name, "source": benchmark.source} | kept)
    except OSError:
        return
