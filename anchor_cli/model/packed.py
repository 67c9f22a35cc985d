"""Packed batches: many texts in one flat row, no padding.

Legend: N texts, T tokens in all, R pairs, D hidden size. For a pair batch the texts are query_0 … query_{R-1},
document_0 … document_{R-1}, so N = 2R and the other side of text i is text (i + R) mod 2R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Targets = Literal["text", "content"]


@dataclass(frozen=True)
class PackedTexts:
    """N texts in one row. Tensors share a device; `lengths` stay in Python for the CPU kernel and the longest text."""

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, from 0 in every text
    cu_seqlens: torch.Tensor  # (N+1,) int32
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> PackedTexts:
        """The same batch on a device; from pinned memory the copy is asynchronous."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedTexts:
        return PackedTexts(move(self.input_ids), move(self.position_ids), move(self.cu_seqlens), self.lengths)


def pack_texts(ids: Sequence[npt.NDArray[np.int32]]) -> PackedTexts:
    """Concatenate texts ((n_i,) token ids each, no empty ones) into one packed row."""
    lengths = np.array([len(text) for text in ids], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return PackedTexts(
        torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(bounds.astype(np.int32)),
        tuple(lengths.tolist()),
    )


@dataclass(frozen=True)
class TextBatch:
    """One micro-batch of N texts for `PackedEncoder.forward`."""

    texts: PackedTexts
    content_starts: torch.Tensor  # (N,) int64: first content token of each text, for the pooling modes that need it

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on a device; from pinned memory the copy is asynchronous."""
        return TextBatch(self.texts.to(device), self.content_starts.to(device, non_blocking=True))

    def pin(self) -> TextBatch:
        """The same batch in page-locked memory (CUDA hosts only)."""
        return TextBatch(self.texts.map(lambda t: t.pin_memory()), self.content_starts.pin_memory())


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of R pairs, ready for `ReconstructionModel.forward`.

    `texts` are the encode pass. The reconstruct pass has one slot fewer a text: slot 0 takes the other side's
    embedding, slot k > 0 takes E(t_k), and slot k predicts t_{k+1} (counting t from 1). `recon` carries the ids shifted
    so that `recon.input_ids[slot]` is the token whose embedding enters the slot; slot 0's id is a placeholder.
    """

    texts: PackedTexts
    recon: PackedTexts
    first_slots: torch.Tensor  # (2R,) int64: where in the reconstruct row each text's slot 0 is
    content_starts: torch.Tensor  # (2R,) int64: first content token of each text, for the pooling modes that need it
    target_slots: torch.Tensor  # (K,) int64: slots of the reconstruct row with a target
    target_ids: torch.Tensor  # (K,) int64
    num_query_targets: int  # the first so many of the K targets are query tokens (D2Q), the rest document tokens (Q2D)

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device; from pinned memory the copy is asynchronous."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> PairBatch:
        """The same batch in page-locked memory (CUDA hosts only)."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PairBatch:
        return PairBatch(
            self.texts.map(move),
            self.recon.map(move),
            move(self.first_slots),
            move(self.content_starts),
            move(self.target_slots),
            move(self.target_ids),
            self.num_query_targets,
        )


def pack_pairs(
    query_ids: Sequence[npt.NDArray[np.int32]],
    document_ids: Sequence[npt.NDArray[np.int32]],
    query_content_starts: npt.NDArray[np.int32],
    document_content_starts: npt.NDArray[np.int32],
    *,
    eos_token_id: int,
    targets: Targets,
) -> PairBatch:
    """Pack R pairs. [EOS] ids are never targets; `content` keeps only content tokens as targets."""
    ids = [*query_ids, *document_ids]
    starts = np.concatenate([query_content_starts, document_content_starts]).astype(np.int64)
    texts = pack_texts(ids)
    # t_1 … t_{n-1} are predicted; the embedding of t_{k-1} enters slot k (k = 1 …), e enters slot 0.
    recon = pack_texts([np.concatenate([text[:1], text[: len(text) - 2]]) for text in ids])
    predicted = np.concatenate([text[:-1] for text in ids]).astype(np.int64)
    slot_in_text = recon.position_ids.numpy()
    is_target = predicted != eos_token_id
    if targets == "content":
        is_target &= slot_in_text >= np.repeat(starts, recon.lengths)
    slots = np.flatnonzero(is_target)
    query_slots = sum(recon.lengths[: len(query_ids)])
    return PairBatch(
        texts=texts,
        recon=recon,
        first_slots=recon.cu_seqlens[:-1].to(torch.int64),
        content_starts=torch.from_numpy(starts),
        target_slots=torch.from_numpy(slots),
        target_ids=torch.from_numpy(predicted[slots]),
        num_query_targets=int(np.searchsorted(slots, query_slots)),
    )


def num_targets(
    lengths: npt.NDArray[np.int32],
    content_starts: npt.NDArray[np.int32],
    eos: npt.NDArray[np.int32],
    targets: Targets,
) -> npt.NDArray[np.int64]:
    """(R,) target tokens of each text, from what `prepare` stored: how every rank knows a step's normaliser.

    `eos` (R,): [EOS] ids before the closing one, for `content` those of the content alone.
    """
    base = lengths.astype(np.int64) - 1 - eos
    return base - content_starts if targets == "content" else base
