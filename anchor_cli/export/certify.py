"""The certificate of an export: the same vectors through our encoder, sentence-transformers and plain transformers.

`certify` starts a fresh process, which knows nothing of the one that exported, reads the folder as a user would and
compares token ids and embeddings of fixed texts in float32 on the CPU. The result is `parity.json`.

Legend: N texts, D embedding size.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import RunError

FILE_NAME = "parity.json"
TOLERANCE = 1e-6
"""Largest 1 - cosine of a text's two vectors: float32 rounding of models up to some 30 layers stays below."""
BATCH_SIZES = ((1, "left"), (32, "left"), (32, "right"))
"""(texts a batch, padding side); alone a text is not padded."""

Vectors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One way to encode the texts, compared with ours."""

    against: str
    batch_size: int
    padding_side: str
    num_texts: int
    lowest_cosine: float
    largest_difference: float
    """Of one number of the normalised vectors."""
    num_other_ids: int
    """Texts whose token ids differ."""
    worst: str
    """Prompt and beginning of the text with the lowest cosine, or of the first with other ids."""

    @property
    def passed(self) -> bool:
        return self.num_other_ids == 0 and self.lowest_cosine >= 1 - TOLERANCE


def certify(folder: Path, checkpoint: Path | None = None, *, converted: bool = False) -> dict[str, Any]:
    """Re-embed the fixed texts in a fresh process and return what becomes `parity.json`.

    `checkpoint`: what was exported; its vectors must be the same, unless its weights were `converted` to another dtype.

    Raises:
        RunError: vectors or ids differ, or a library could not load the folder; the message says which and how.
    """
    with tempfile.TemporaryDirectory(prefix="anchor-certificate-") as place:
        out = Path(place) / FILE_NAME
        command = [sys.executable, "-m", "anchor_cli.export.certify", str(folder.absolute()), str(out)]
        command += [str(checkpoint.absolute()) if checkpoint else "-", "converted" if converted else "same"]
        offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command, env=os.environ | offline | {"PYTHONPATH": paths}, capture_output=True, text=True, errors="replace"
        )
        if not out.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise RunError(f"certificate: the exported folder could not be read back: {lines[-1].strip()[:300]}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if not result["passed"]:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        raise RunError(f"certificate: {result['failed']}", f"nothing was exported; please report it with {versions}")
    return result


def compare(against: str, batch_size: int, padding_side: str, ours: _Encoded, theirs: _Encoded) -> Check:
    """Ours and theirs, text by text."""
    a, b = (each.vectors / np.linalg.norm(each.vectors, axis=1, keepdims=True) for each in (ours, theirs))
    cosines = np.nan_to_num((a * b).sum(axis=1), nan=-1.0)
    other_ids = [i for i, pair in enumerate(zip(ours.ids, theirs.ids, strict=True)) if pair[0] != pair[1]]
    worst = other_ids[0] if other_ids else int(cosines.argmin())
    return Check(
        against,
        batch_size,
        padding_side,
        len(cosines),
        float(cosines.min()),
        float(np.nan_to_num(np.abs(a - b), nan=2.0).max()),
        len(other_ids),
        ours.names[worst],
    )


@dataclass(frozen=True)
class _Encoded:
    names: list[str]
    ids: list[list[int]]
    vectors: Vectors  # (N, D)


def _by_us(model: Path, subject: _Subject) -> _Encoded:
    """Through anchor's own encoder, from the export or from the checkpoint it was made of."""
    from anchor_cli.evaluate.embedder import PackedEmbedder, load_embedder

    embedder = load_embedder(model, device="cpu", dtype="float32")
    if not isinstance(embedder, PackedEmbedder):
        raise RunError(f"{model}: anchor.json is missing")
    names = [f"{group.prompt_name} {text[:40]!r}" for group in subject.groups for text in group.texts]
    ids = [text.ids.tolist() for text in subject.tokenised]
    vectors = [embedder.encode(group.texts, group.instruction) for group in subject.groups]
    return _Encoded(names, ids, np.concatenate(vectors).astype(np.float64))


class _Subject:
    """The folder under examination, its texts, and what our rule makes of them."""

    def __init__(self, folder: Path) -> None:
        from anchor_cli.base.contract import read_contract
        from anchor_cli.data.text import TextEncoder, load_tokenizer
        from anchor_cli.export.certificate_texts import groups
        from anchor_cli.export.tokenizer import closes_texts

        self.folder = folder
        self.contract = read_contract(folder)
        encoder = TextEncoder(load_tokenizer(folder), self.contract.text_template, self.contract.max_seq_length)
        self.groups = groups(self.contract, encoder)
        self.tokenised = [
            text for group in self.groups for text in encoder.encode_batch(group.texts, group.instruction)
        ]
        self.appends_eos = closes_texts(self.contract)

    def reference(self, ours: _Encoded) -> _Encoded:
        """Ours, less the [EOS] that the exported tokenizer does not append in modes that do not pool it."""
        return ours if self.appends_eos else _Encoded(ours.names, [ids[:-1] for ids in ours.ids], ours.vectors)


def _by_sentence_transformers(subject: _Subject, ours: _Encoded) -> Iterator[Check]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(subject.folder), device="cpu", trust_remote_code=True, model_kwargs={"dtype": torch.float32}
    )
    for batch_size, side in BATCH_SIZES:
        model.tokenizer.padding_side = side
        ids: list[list[int]] = []
        vectors = []
        for group in subject.groups:
            for text in group.texts:
                features = (
                    model.preprocess([text], prompt=group.prompt)
                    if hasattr(model, "preprocess")
                    else model.tokenize([group.prompt + text])
                )
                ids.append(features["input_ids"][0].tolist())
            vectors.append(model.encode(group.texts, prompt_name=group.prompt_name, batch_size=batch_size))
        theirs = _Encoded(ours.names, ids, np.concatenate(vectors).astype(np.float64))
        yield compare("sentence-transformers", batch_size, side, subject.reference(ours), theirs)


def _by_transformers(subject: _Subject, ours: _Encoded) -> Iterator[Check]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(subject.folder))
    model = AutoModel.from_pretrained(str(subject.folder), dtype=torch.float32)
    starts = [text.content_start for text in subject.tokenised]
    texts = [group.prompt + text for group in subject.groups for text in group.texts]
    longest_first = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    for batch_size, side in BATCH_SIZES:
        ids: list[list[int]] = [[] for _ in texts]
        vectors = np.zeros_like(ours.vectors)
        for begin in range(0, len(texts), batch_size):
            chosen = longest_first[begin : begin + batch_size]
            batch = tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                padding_side=side,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            for row, index in enumerate(chosen):
                kept = batch["attention_mask"][row].bool()
                ids[index] = batch["input_ids"][row][kept].tolist()
                vectors[index] = _pooled(states[row][kept], starts[index], subject.contract.pooling_mode)
        theirs = _Encoded(ours.names, ids, vectors)
        yield compare("transformers", batch_size, side, subject.reference(ours), theirs)


def _pooled(states: Any, content_start: int, mode: str) -> Vectors:
    """(n, D) states of one text without padding -> (D,). The export appends [EOS] in `eos_token` mode only."""
    values: Vectors = states.double().numpy()
    if mode in ("eos_token", "last_token"):
        last: Vectors = values[-1]
        return last
    content = values[content_start:]
    weights = np.arange(1, len(content) + 1) if mode == "weighted_mean" else np.ones(len(content))
    pooled: Vectors = (content * weights[:, None]).sum(axis=0) / weights.sum()
    return pooled


def examine(folder: Path, checkpoint: Path | None, *, converted: bool) -> dict[str, Any]:
    """Everything that can be checked here, as `parity.json` says it.

    `converted`: the weights have another dtype than the checkpoint's, whose vectors then differ and are only reported.
    """
    from anchor_cli.base.files import sha256_file

    subject = _Subject(folder)
    ours = _by_us(folder, subject)
    checks: list[Check] = []
    not_checked: list[str] = []
    before = compare("the checkpoint", 0, "none", ours, _by_us(checkpoint, subject)) if checkpoint else None
    if before and not converted:
        checks.append(before)
    checks += _by_transformers(subject, ours)
    gc.collect()
    if _version("sentence-transformers"):
        checks += _by_sentence_transformers(subject, ours)
    else:
        not_checked.append("sentence-transformers: not installed here")
    failed = next((check for check in checks if not check.passed), None)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {
        "passed": failed is None,
        "failed": None if failed is None else _reason(failed),
        "tolerance": TOLERANCE,
        "arithmetic": "float32 on the CPU, a fresh process",
        "num_texts": len(ours.names),
        "num_truncated": sum(len(text.ids) < text.num_tokens for text in subject.tokenised),
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "not_checked": not_checked,
        "lowest_cosine_to_the_checkpoint": before.lowest_cosine if before else None,
        "versions": {name: _version(name) for name in ("torch", "transformers", "tokenizers", "sentence-transformers")},
        "files": {name: sha256_file(folder / name) for name in names},
    }


def _reason(check: Check) -> str:
    batches = f" (batches of {check.batch_size}, padding {check.padding_side})" if check.batch_size else ""
    way, num = check.against + batches, check.num_other_ids
    if num:
        return f"{way} makes other token ids of {num} of {check.num_texts} texts, first of {check.worst}"
    return f"{way} gives other vectors: cosine {check.lowest_cosine:.6f} for {check.worst}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> None:
    """`python -m anchor_cli.export.certify FOLDER OUT CHECKPOINT|- converted|same`."""
    folder, out, checkpoint, weights = arguments
    source = None if checkpoint == "-" else Path(checkpoint)
    result = examine(Path(folder), source, converted=weights == "converted")
    Path(out).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
