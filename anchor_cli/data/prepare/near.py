"""Near-duplicate pairs: MinHash signatures of query and document, cut into bands (datasketch does the signatures).

A pair counts as seen when some band of its query *and* the same band of its document equal those of an earlier pair:
many questions about one document are no duplicates. With 10 bands of 12 values each, pairs whose character 5-grams
have Jaccard similarities q and d are found with probability 1 - (1 - q^12 d^12)^10: 0.97 for q = d = 0.95, 0.96 for
(0.9, 1), 0.51 for (0.8, 1), 0.13 for (0.7, 1), 0.002 for (0.5, 1). Bands are 64-bit keys for `checks.Seen`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import InputError
from anchor_cli.data.prepare.leaks import words_of

BANDS, BAND_VALUES = 10, 12
_SHINGLE_CHARACTERS = 5


def require_library() -> None:
    """Raises InputError, with the remedy, when datasketch is not installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        remedy = "pip install 'anchor-cli[minhash]'"
        raise InputError("--near-duplicates needs the package datasketch", remedy) from None


def near_keys(pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.uint64]:
    """(R, BANDS) one key a band of each (query, document)."""
    keys = np.empty((len(pairs), BANDS), dtype=np.uint64)
    for row, (query, document) in enumerate(pairs):
        both = np.concatenate([_signature(query), _signature(document)], axis=1)  # (BANDS, 2 x BAND_VALUES)
        for band in range(BANDS):
            digest = hashlib.blake2b(bytes([band]) + both[band].tobytes(), digest_size=8).digest()
            keys[row, band] = int.from_bytes(digest, "little")
    return keys


def _signature(text: str) -> npt.NDArray[np.uint64]:
    """(BANDS, BAND_VALUES) smallest hashes of the text's shingles."""
    from datasketch import MinHash

    plain = " ".join(words_of(text))
    last = max(len(plain) - _SHINGLE_CHARACTERS, 0)
    shingles = {plain[at : at + _SHINGLE_CHARACTERS].encode() for at in range(last + 1)}
    sketch = MinHash(num_perm=BANDS * BAND_VALUES, seed=1, hashfunc=crc32)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues, dtype=np.uint64).reshape(BANDS, BAND_VALUES)
