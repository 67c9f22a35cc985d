"""NanoBEIR: 13 small BEIR sets of 50 queries or so, in the layout of sentence-transformers' NanoBEIREvaluator.

A Hub data set, or a folder of the same layout, has the configurations `corpus` (_id, text), `queries` (_id, text) and
`qrels` (query-id, corpus-id), each with one split a subset, such as NanoNQ. As in the evaluator a `title` is not read;
a `score` column is honoured where there is one. A *snapshot* is a folder `{lang}/{subset}` of BEIR folders with the
manifest `nanobeir.json`: evaluation without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anchor_cli.base.console import progress
from anchor_cli.base.errors import InputError, first_line, nearest
from anchor_cli.base.files import sha256_file, staged_folder, words_for_disk_errors, write_json, write_text_atomic
from anchor_cli.base.hub import revision_of
from anchor_cli.base.language import language_of
from anchor_cli.data.benchmarks.beir import (
    CORPUS_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    Benchmark,
    Row,
    assemble,
    read_beir,
    read_jsonl,
    read_judgements,
    read_texts,
)
from anchor_cli.data.benchmarks.hub_sets import hub_errors, own_cache, splits_of

HUB_IDS = {"ko": "sionic-ai/NanoBEIR-ko", "en": "sentence-transformers/NanoBEIR-en"}
KURE_SUBSETS = ("NanoMSMARCO", "NanoNQ")
SUBSETS = (
    "NanoArguAna",
    "NanoClimateFEVER",
    "NanoDBPedia",
    "NanoFEVER",
    "NanoFiQA2018",
    "NanoHotpotQA",
    "NanoMSMARCO",
    "NanoNFCorpus",
    "NanoNQ",
    "NanoQuoraRetrieval",
    "NanoSCIDOCS",
    "NanoSciFact",
    "NanoTouche2020",
)
REMEDY = "with a network: anchor prepare nanobeir --out DIR; then here: --data DIR, or ANCHOR_NANOBEIR=DIR"
CONFIGURATIONS = ("corpus", "queries", "qrels")
MANIFEST_FILE = "nanobeir.json"


def subset_named(name: str, known: Iterable[str] = SUBSETS) -> str:
    """The subset meant by `NanoNQ`, `nanonq` or `nq`.

    Raises:
        InputError: no such subset; the message has the nearest.
    """
    known = list(known)
    plain = name.lower().removeprefix("nano")
    for subset in known:
        if subset.lower().removeprefix("nano") == plain:
            return subset
    near = nearest(name, known) or nearest("Nano" + name, known)
    hint = f"did you mean {near}?" if near else None
    raise InputError(f"NanoBEIR subset {name!r}: not one of {', '.join(known)}", hint)


def is_nano_folder(folder: Path) -> bool:
    """Whether a folder has the layout of a NanoBEIR data set on the Hub."""
    return all((folder / config).is_dir() for config in CONFIGURATIONS) and not (folder / QRELS_FILE).exists()


def read_nano(source: str, subset: str, language: str | None = None) -> Benchmark:
    """One subset of a NanoBEIR data set: a folder of that layout, or a Hub id.

    Raises:
        InputError: the subset is not there, or a row of it is not as it must be.
        RunError: the Hub cannot be reached and its files are not in the cache.
    """
    queries = read_texts(_rows(source, "queries", subset), repeats=True)
    corpus = read_texts(_rows(source, "corpus", subset), repeats=True)
    qrels = read_judgements(_rows(source, "qrels", subset), repeats=True)
    language = language or language_of(" ".join(queries.values()))
    return assemble(f"{language}/{subset}", language, queries, corpus, qrels, f"{source}/{subset}")


def subsets_of(source: str) -> list[str]:
    """The subsets that a folder or Hub data set has, by its queries."""
    folder = Path(source)
    if folder.is_dir():
        names = {path.name.split(".")[0].split("-")[0] for path in (folder / "queries").iterdir() if _is_data(path)}
        if names:
            return sorted(names)
    return sorted(splits_of(source, "queries"))


def _is_data(path: Path) -> bool:
    return path.suffix in (".jsonl", ".parquet") or path.is_dir()


def _rows(source: str, config: str, split: str) -> Iterator[Row]:
    """Rows of one split of one configuration, with their places."""
    folder = Path(source)
    if not folder.is_dir():
        yield from _hub_rows(source, config, split)
        return
    patterns = [f"{split}{rest}" for rest in (".jsonl", ".parquet", "-*.jsonl", "-*.parquet", "/*.jsonl", "/*.parquet")]
    files = sorted({file for pattern in patterns for file in (folder / config).glob(pattern)})
    if not files and (folder / "README.md").is_file():  # a clone of the Hub's repository, files where its card says
        yield from _hub_rows(source, config, split)
    elif not files:
        present = sorted(path.name for path in (folder / config).glob("*") if _is_data(path))
        near = nearest(split, [name.split(".")[0].split("-")[0] for name in present])
        raise InputError(
            f"{folder / config}: no {split}.jsonl and no {split}.parquet; found {', '.join(present[:20]) or 'nothing'}",
            near and f"did you mean {near}?",
        )
    for file in files:
        yield from read_jsonl(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches():
            for number, row in enumerate(batch.to_pylist(), start=1):
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file: {first_line(error)}") from None


def _hub_rows(source: str, config: str, split: str) -> Iterator[Row]:
    """Rows of the Hub, or of a clone of a repository of it: here a missing split is an error, never another one."""
    from datasets import load_dataset

    with hub_errors(source, f"{config}/{split}", REMEDY):
        table = load_dataset(source, config, split=split, **own_cache(source))
    for number, row in enumerate(table, start=1):
        yield f"{source} {config}/{split}: row {number}", row


def snapshot_nanobeir(
    out: Path,
    *,
    languages: Iterable[str] = ("ko", "en"),
    subsets: Iterable[str] = SUBSETS,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write NanoBEIR into the new folder `out`, for evaluation without a network. Returns the manifest.

    `sources`: Hub id or folder by language, instead of `HUB_IDS`.

    Raises:
        InputError, RunError: a subset cannot be read or written; then `out` does not appear.
    """
    chosen = {**HUB_IDS, **(sources or {})}
    wanted = [(language, subset_named(subset)) for language in languages for subset in subsets]
    if unknown := [language for language, _ in wanted if language not in chosen]:
        raise InputError(f"NanoBEIR language {unknown[0]!r}: expected one of {', '.join(chosen)}")
    manifest: dict[str, Any] = {"format": 1, "sources": {}, "sets": {}}
    disk_errors = words_for_disk_errors(out, remedy="make room, or choose another place with --out")
    with disk_errors, staged_folder(out) as staged, progress("NanoBEIR", len(wanted), "sets") as bar:
        for language, subset in wanted:
            source = chosen[language]
            if language not in manifest["sources"]:
                revision = None if Path(source).is_dir() else revision_of(source)
                manifest["sources"][language] = {"id": source, "revision": revision}
            benchmark = read_nano(source, subset, language)
            manifest["sets"][benchmark.name] = _write_beir(staged / language / subset, benchmark)
            bar.advance()
        write_json(staged / MANIFEST_FILE, manifest)
    return manifest


def _write_beir(folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    for file, texts in ((CORPUS_FILE, benchmark.corpus), (QUERIES_FILE, benchmark.queries)):
        lines = [json.dumps({"_id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in texts.items()]
        write_text_atomic(folder / file, "".join(lines))
    lines = [
        f"{query}\t{document}\t{grade}\n"
        for query, judged in benchmark.qrels.items()
        for document, grade in judged.items()
    ]
    write_text_atomic(folder / QRELS_FILE, "query-id\tcorpus-id\tscore\n" + "".join(lines))
    return {
        "queries": len(benchmark.queries),
        "documents": len(benchmark.corpus),
        "judgements": len(lines),
        "notes": benchmark.notes,
        "sha256": {file: sha256_file(folder / file) for file in (CORPUS_FILE, QUERIES_FILE, QRELS_FILE)},
    }


def snapshot_sets(folder: Path) -> list[str]:
    """Names of the benchmarks in a snapshot, such as `ko/NanoNQ`.

    Raises:
        InputError: its manifest cannot be read.
    """
    return list(_manifest(folder)["sets"])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == 1 and isinstance(manifest["sets"], dict):
            return dict(manifest)
        raise InputError(f"{path}: format {manifest['format']!r}, expected 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest of a NanoBEIR snapshot: {error}") from None


def read_snapshot(folder: Path, name: str) -> Benchmark:
    """One benchmark of a snapshot, its files checked against the manifest.

    Raises:
        InputError: it is not in the snapshot, or a file has changed since it was written.
    """
    sets = _manifest(folder)["sets"]
    if name not in sets:
        near = nearest(name, sets)
        raise InputError(
            f"{folder}: {name!r} is not in this snapshot; it has {', '.join(sets)}", near and f"did you mean {near}?"
        )
    for file, digest in sets[name]["sha256"].items():
        path = folder / name / file
        if not path.is_file() or sha256_file(path) != digest:
            state = "has changed since the snapshot was written" if path.is_file() else "not found"
            raise InputError(f"{path}: {state}", "make the snapshot again: anchor prepare nanobeir --out DIR")
    benchmark = read_beir(folder / name, name.split("/")[0], name)
    return Benchmark(**{**vars(benchmark), "notes": [*sets[name].get("notes", []), *benchmark.notes]})
