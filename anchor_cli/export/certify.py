"""The certificate of an export: the same vectors through our encoder, sentence-transformers and plain transformers.

`certify` starts a fresh process, which shares nothing with the one that exported, reads the folder as a user would and
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import RunError

FILE_NAME = "parity.json"
TOLERANCE = 1e-6
"""Largest 1 - cosine of a text's two vectors: float32 rounding of models up to some 30 layers stays below."""


@dataclass(frozen=True)
class Comparison:
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

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        batches = f" (batches of {self.batch_size}, padding {self.padding_side})" if self.batch_size else ""
        way, num = self.against + batches, self.num_other_ids
        if num:
            return f"{way} makes other token ids of {num} of {self.num_texts} texts, first of {self.worst}"
        return f"{way} gives other vectors: cosine {self.lowest_cosine:.6f} for {self.worst}"


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


@dataclass(frozen=True)
class Encoded:
    """N texts through one encoder."""

    names: list[str]
    """Prompt and beginning of each."""
    ids: list[list[int]]
    vectors: npt.NDArray[np.float64]  # (N, D)


def compare(against: str, batch_size: int, padding_side: str, ours: Encoded, theirs: Encoded) -> Comparison:
    """Ours and theirs, text by text."""
    a, b = (each.vectors / np.linalg.norm(each.vectors, axis=1, keepdims=True) for each in (ours, theirs))
    cosines = np.nan_to_num((a * b).sum(axis=1), nan=-1.0)
    other_ids = [i for i, pair in enumerate(zip(ours.ids, theirs.ids, strict=True)) if pair[0] != pair[1]]
    worst = other_ids[0] if other_ids else int(cosines.argmin())
    return Comparison(
        against,
        batch_size,
        padding_side,
        len(cosines),
        float(cosines.min()),
        float(np.nan_to_num(np.abs(a - b), nan=2.0).max()),
        len(other_ids),
        ours.names[worst],
    )


class CertifiedTexts:
    """The fixed texts of an export, the token ids that our rule makes of them, and how each encoder is compared."""

    def __init__(self, folder: Path) -> None:
        from anchor_cli.base.contract import read_contract
        from anchor_cli.data.text import TextEncoder, load_tokenizer
        from anchor_cli.export.certificate_texts import groups

        self.folder = folder
        self.contract = read_contract(folder)
        encoder = TextEncoder(load_tokenizer(folder), self.contract.text_template, self.contract.max_seq_length)
        self.groups = groups(self.contract, encoder)
        self.tokenised = [encoder.encode_batch(group.texts, group.instruction) for group in self.groups]
        self.names = [f"{group.prompt_name} {text[:40]!r}" for group in self.groups for text in group.texts]
        self.ids = [text.ids.tolist() for texts in self.tokenised for text in texts]
        self.num_truncated = sum(len(text.ids) < text.num_tokens for texts in self.tokenised for text in texts)

    def for_readers(self) -> list[dict[str, Any]]:
        """The groups as `export/readers.py` takes them."""
        return [
            {
                "prompt_name": group.prompt_name,
                "prompt": group.prompt,
                "texts": group.texts,
                "content_starts": [int(text.content_start) for text in texts],
            }
            for group, texts in zip(self.groups, self.tokenised, strict=True)
        ]

    def by_anchor(self, model: Path) -> Encoded:
        """Through anchor's own encoder, from the export or from the checkpoint it was made of."""
        from anchor_cli.evaluate.embedder import PackedEmbedder, load_embedder

        embedder = load_embedder(model, device="cpu", dtype="float32")
        if not isinstance(embedder, PackedEmbedder):
            raise RunError(f"{model}: anchor.json is missing")
        vectors = [embedder.encode(group.texts, group.instruction) for group in self.groups]
        return Encoded(self.names, self.ids, np.concatenate(vectors).astype(np.float64))

    def compare_reading(self, library: str, ours: Encoded, reading: Sequence[Any]) -> Comparison:
        """Without the [EOS] that the exported tokenizer does not append in modes that do not pool it."""
        from anchor_cli.export.tokenizer import closes_texts

        batch_size, side, ids, vectors = reading
        want = ours if closes_texts(self.contract) else Encoded(ours.names, [i[:-1] for i in ours.ids], ours.vectors)
        return compare(library, batch_size, side, want, Encoded(self.names, ids, np.asarray(vectors, dtype=np.float64)))


def compare_all(folder: Path, checkpoint: Path | None, *, converted: bool) -> dict[str, Any]:
    """Every comparison that can be made here, as `parity.json` says it.

    `converted`: the weights have another dtype than the checkpoint's, whose vectors then differ and are only reported.
    """
    from anchor_cli.base.files import sha256_file
    from anchor_cli.export import readers

    texts = CertifiedTexts(folder)
    ours = texts.by_anchor(folder)
    checks: list[Comparison] = []
    not_checked: list[str] = []
    before = compare("the checkpoint", 0, "none", ours, texts.by_anchor(checkpoint)) if checkpoint else None
    if before and not converted:
        checks.append(before)
    groups = texts.for_readers()
    for reading in readers.by_transformers(str(folder), groups, texts.contract.pooling_mode):
        checks.append(texts.compare_reading("transformers", ours, reading))
    gc.collect()
    if _version("sentence-transformers"):
        for reading in readers.by_sentence_transformers(str(folder), groups):
            checks.append(texts.compare_reading("sentence-transformers", ours, reading))
    else:
        not_checked.append("sentence-transformers: not installed here")
    failed = next((check for check in checks if not check.passed), None)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {
        "passed": failed is None,
        "failed": None if failed is None else failed.reason,
        "tolerance": TOLERANCE,
        "arithmetic": "float32 on the CPU, a fresh process",
        "num_texts": len(ours.names),
        "num_truncated": texts.num_truncated,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "not_checked": not_checked,
        "lowest_cosine_to_the_checkpoint": before.lowest_cosine if before else None,
        "versions": {name: _version(name) for name in ("torch", "transformers", "tokenizers", "sentence-transformers")},
        "files": {name: sha256_file(folder / name) for name in names},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> None:
    """`python -m anchor_cli.export.certify FOLDER OUT CHECKPOINT|- converted|same`."""
    folder, out, checkpoint, weights = arguments
    source = None if checkpoint == "-" else Path(checkpoint)
    result = compare_all(Path(folder), source, converted=weights == "converted")
    Path(out).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
