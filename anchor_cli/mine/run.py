"""One mining from pairs to a prepared folder: opens what is needed, lets the ranks work, writes the result.

The folder appears under its name by one rename, when it is whole: prepared rows with negatives, `mining.json`,
`mining.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anchor_cli.base.console import progress, say, warn
from anchor_cli.base.contract import FILE_NAME, TextContract, read_contract
from anchor_cli.base.errors import InputError, first_line
from anchor_cli.base.files import fsync_tree, write_json
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent
from anchor_cli.data.pairs import MANIFEST, PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.data.text import load_tokenizer, tokenizer_fingerprint
from anchor_cli.data.training_set import prepare_keys, raw_digest
from anchor_cli.evaluate.embedder import contract_of, load_embedder
from anchor_cli.mine import mine
from anchor_cli.mine.corpus import Corpus, corpus_of
from anchor_cli.mine.page import write_page
from anchor_cli.mine.select import REJECTED, Rules
from anchor_cli.mine.store import Store, claim, require_ours

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

SUMMARY, PAGE = "mining.json", "mining.html"
HISTOGRAM_BINS = 50


@dataclass(frozen=True)
class Mining:
    """What `anchor mine` is asked for."""

    pairs: str
    """Prepared pairs, or what `anchor prepare` reads."""
    model: Path
    out: Path
    rules: Rules
    further: Sequence[str] = ()
    """Further documents."""
    work_dir: Path | None = None
    """Where embeddings are kept; kept afterwards, too. None: beside `out`, removed when all is done."""
    batch_tokens: int = 16384
    cross_encoder: str | None = None
    tokenizer: str | None = None
    """The tokenizer that the pairs are, or will be, prepared with. None: the model's."""

    @property
    def of_pairs(self) -> str | Path:
        """Where the tokenizer of the pairs is."""
        return self.tokenizer or self.model

    @property
    def store(self) -> Path:
        return self.work_dir or self.out.with_name(f"{self.out.name}.mining")


def require_new(mining: Mining) -> None:
    """Refuse a folder that is there, and a store that holds something else. Raises InputError."""
    if mining.out.exists():
        raise InputError(f"{mining.out}: is there already", "name another folder with --out, or remove it")
    require_ours(mining.store)


def prepare_raw_pairs(mining: Mining) -> None:
    """Prepare raw pairs in the store under the model's contract, once; by one process, before ranks exist.

    Raises:
        InputError: no such pairs, or none that can be used; the model's tokenizer is not one that anchor trains.
    """
    folder = pairs_folder(mining)
    if not _is_prepared(folder):
        say(f"{mining.pairs}: raw pairs; preparing them first")
        claim(mining.store)
        prepare([mining.pairs], folder, **prepare_keys(_contract_of_raw(mining), mining.of_pairs))


def open_pairs(mining: Mining) -> PreparedPairs:
    """The pairs, or what `prepare_raw_pairs` made of them.

    Raises:
        InputError: raw pairs under another's launcher (the hint is the line that prepares them); pairs that were
            prepared with another tokenizer, which has to make the tokens of their negatives, too.
    """
    folder = pairs_folder(mining)
    if not _is_prepared(folder):
        raise InputError(
            f"{mining.pairs}: raw pairs, which one of several processes cannot prepare for all",
            f"prepare them once: anchor prepare {mining.pairs} --out DIR --tokenizer {mining.of_pairs}",
        )
    pairs = PreparedPairs.open(folder)
    if _fingerprint(mining.of_pairs) != pairs.contract.tokenizer_fingerprint:
        raise InputError(
            f"{folder}: was prepared with another tokenizer than that of {mining.of_pairs}",
            "name the model that it was prepared for, and that will train on it, with --tokenizer",
        )
    return pairs


def _fingerprint(model: str | Path) -> str | None:
    """Of a model's tokenizer; None: it has none that can be read."""
    try:
        return tokenizer_fingerprint(load_tokenizer(model))
    except InputError:
        return None


def pairs_folder(mining: Mining) -> Path:
    """The prepared pairs; of raw ones a folder in the store, for each state of them and each contract."""
    given = Path(mining.pairs).expanduser()
    if _is_prepared(given):
        return given
    return mining.store / f"pairs-{raw_digest(mining.pairs, _contract_of_raw(mining).model_dump_json())}"


def _contract_of_raw(mining: Mining) -> TextContract:
    try:
        return contract_of(mining.of_pairs, load_tokenizer(mining.of_pairs))
    except InputError as error:
        if mining.tokenizer is not None:
            raise
        hint = "name the model that will train on these pairs with --tokenizer"
        raise InputError(f"{mining.pairs}: cannot be prepared for {mining.model}: {error.message}", hint) from error


def _is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def identity_of(mining: Mining, corpus: Corpus) -> dict[str, Any]:
    """What the embeddings depend on."""
    files = sorted(path for path in mining.model.iterdir() if path.suffix in (".safetensors", ".json"))
    return {
        "pairs": corpus.pairs.fingerprint,
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "documents": hashlib.blake2b(corpus.document_keys.tobytes(), digest_size=16).hexdigest(),
        "batch_tokens": mining.batch_tokens,
    }


def mine_rank(mining: Mining, rank: int, world_size: int, local_rank: int) -> tuple[Store, Corpus]:
    """This rank's share of the work; returns when all ranks have done theirs."""
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    pairs = open_pairs(mining)
    embedder = load_embedder(mining.model, batch_tokens=mining.batch_tokens, device=device, prepared=pairs.contract)
    scorer = None if mining.cross_encoder is None else load_cross_encoder(mining.cross_encoder, device)
    corpus = corpus_of(pairs, mining.further)
    plan = mine.plan_of(identity_of(mining, corpus), mining.rules, mining.cross_encoder)
    if rank == 0:
        _warn_of_another_template(mining.model, pairs)
        store = mine.begin(mining.store, plan)
    else:
        store = Store(mining.store)
        while not mine.has_begun(mining.store, plan):
            time.sleep(0.1)
    place = mine.Place(rank, world_size, device)
    mine.encode(corpus, embedder, store, place)
    mine.search(corpus, embedder.dimension, store, mining.rules, place)
    if scorer is not None:
        mine.score(corpus, scorer, store, place)
    return store, corpus


def load_cross_encoder(model: str, device: str) -> CrossEncoder:
    """The model of `--cross-encoder`, before the work begins.

    Raises:
        InputError: it cannot be loaded, or gives a pair of texts more than one number.
    """
    if not Path(model).is_dir():
        go_offline_if_the_hub_is_silent()
    try:
        from sentence_transformers import CrossEncoder

        scorer: CrossEncoder = CrossEncoder(model, device=device)
    except Exception as error:  # the libraries raise their own kinds
        raise InputError(f"--cross-encoder {model}: cannot be loaded: {first_line(error)}") from error
    if scorer.num_labels != 1:
        raise InputError(
            f"--cross-encoder {model}: gives {scorer.num_labels} numbers for a pair of texts, expected 1",
            "name a model that ranks passages, with one label",
        )
    return scorer


def _warn_of_another_template(model: Path, pairs: PreparedPairs) -> None:
    """Stage II refuses such a model as its start; another one may be meant to start it."""
    if not (model / FILE_NAME).is_file():
        return
    ours, theirs = pairs.contract.text_template, read_contract(model).text_template
    if theirs != ours:
        warn(f"{model} was trained under the template {theirs!r}, and {pairs.folder} was prepared under {ours!r}: "
             "texts are encoded as the pairs were prepared")  # fmt: skip


def finish(mining: Mining, store: Store, corpus: Corpus) -> dict[str, Any]:
    """Write the folder and return what `mining.json` says. Rank 0 only."""
    mined = mine.results(store, corpus)
    staged = mining.out.with_name(f".{mining.out.name}.mined")
    shutil.rmtree(staged, ignore_errors=True)
    rows = store.folder / "rows.jsonl"
    _write_rows(rows, mined, corpus)
    options = Options(
        query_column="anchor",
        document_column="positive",
        language_column="language",
        negatives=True,
        separator_as_text=not corpus.pairs.has_records,
        reported=None,
        max_characters=sys.maxsize,  # those of the pairs were let in, and a corpus has its own rules
    )
    written = prepare([str(rows)], staged, **prepare_keys(corpus.pairs.contract, mining.of_pairs), options=options)
    rows.unlink()
    if lost := written.tally.rejected:
        warn(f"{lost.total():,} rows could not be written: {', '.join(lost)}; {mining.out / 'rejected.jsonl'} has them")
    summary = summary_of(mining, mined, corpus) | {"rows": written.tally.num_kept}
    write_json(staged / SUMMARY, summary)
    write_page(staged / PAGE, summary, samples_of(mined, corpus))
    fsync_tree(staged)
    os.rename(staged, mining.out)
    if mining.work_dir is None:
        shutil.rmtree(mining.store, ignore_errors=True)
    return summary


def _write_rows(path: Path, mined: mine.MinedRows, corpus: Corpus) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file, progress("write", len(mined), "rows") as bar:
        for record in mine.records(mined, corpus, range(len(mined))):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.advance(1)


def summary_of(mining: Mining, mined: mine.MinedRows, corpus: Corpus) -> dict[str, Any]:
    """What was mined, in numbers: `mining.json`, `--json` and the page."""
    rows_with = np.bincount(np.diff(mined.first)).tolist()
    edges = np.linspace(-1.0, 1.0, HISTOGRAM_BINS + 1)
    return {
        "out": str(mining.out),
        "model": str(mining.model),
        "cross_encoder": mining.cross_encoder,
        "rules": asdict(mining.rules),
        "rows": len(mined),
        "queries": corpus.num_queries,
        "documents": corpus.num_documents,
        "negatives": len(mined.negatives),
        "rows_with": {str(num): rows for num, rows in enumerate(rows_with) if rows},
        "rejected": {reason: mined.rejected[reason] for reason in REJECTED if mined.rejected[reason]},
        "scores": {
            "edges": [round(float(edge), 6) for edge in edges],
            "positives": np.histogram(mined.positive_scores, edges)[0].tolist(),
            "negatives": np.histogram(mined.negative_scores, edges)[0].tolist(),
        },
    }


def samples_of(mined: mine.MinedRows, corpus: Corpus, num: int = 20) -> list[dict[str, Any]]:
    """Rows to read, evenly spread; of a record the content."""
    rows = np.unique(np.linspace(0, len(mined) - 1, num).astype(np.int64)).tolist()
    samples = []
    for row, record in zip(rows, mine.records(mined, corpus, rows), strict=True):
        query, positive, _ = corpus.pairs.texts(row)
        samples.append(record | {"row": row, "anchor": query, "positive": positive})
    return samples
