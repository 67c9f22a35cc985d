"""Stage II: the contrastive loss of one step and its gradient, functions of the step's ordered embeddings alone.

Legend: G rows of the step, N documents, D dimensions; a chunk has B rows and C candidates.

    s_ic = cos(e(q_i), e(d_c));  p(i) the positive of row i, H_i its own negatives

    z_ic = s_ic / temperature + hardness_strength * sg(s_ic) * [c is hardened]       sg: no gradient flows through it
    dropped, for c != p(i):  c is the text of a known positive of q_i, or, g the guide's cosine,
                             g_ic > g_ip - margin (absolute)  or  g_ic > g_ip * (1 - margin) (relative)
    L = 1/G * sum_i [ log sum_{c kept} exp z_ic - z_ip ]
    Matryoshka (arXiv 2205.13147): sum_m w_m L(first m dimensions) / sum_m w_m
    distillation: + kd_weight * 1/G * sum_i KL( softmax(scores_i / kd_temperature) || softmax(s_i / kd_temperature) )

InfoNCE is arXiv 1807.03748; dropping by a guide is GISTEmbed, arXiv 2402.16829 (the model as its own guide: s is g);
hardness weights are arXiv 2503.04812 (in-batch negatives) and 2509.20354 (a row's own negatives).

Gradients are written out: d L / d s_ic = (softmax(z_i)_c - [c = p(i)]) / (temperature * G). Scores are formed in chunks
of rows in float32 (float64 stays), each dropped before the next, so memory does not grow with G x N.

Long because the loss and its written-out gradient are read together, term by term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

InBatchNegatives = Literal["all", "same_language", "none"]
MarginStrategy = Literal["absolute", "relative"]
HardnessMode = Literal["hard_negatives", "explicit_negatives", "in_batch_negatives", "all_negatives"]

CHUNK_SCORES = 2**24  # scores of a chunk, 64 MiB in float32; some five tensors of that size live at once
_ROWS_ALONE = 64  # rows of a chunk when no row sees another's documents
NEAR_THRESHOLD = 1e-3
"""A candidate this close to the margin's threshold may be kept by one number format and dropped by another."""


@dataclass(frozen=True)
class ContrastSettings:
    """The spec's keys of Stage II that the loss depends on; see there."""

    temperature: float = 0.01
    in_batch_negatives: InBatchNegatives = "all"
    negatives_group_size: int | None = None
    margin_strategy: MarginStrategy | None = None
    margin: float = 0.0
    hardness_mode: HardnessMode | None = None
    hardness_strength: float = 0.0
    matryoshka_dims: Sequence[int] | None = None
    matryoshka_weights: Sequence[float] | None = None
    kd_weight: float = 0.0
    kd_temperature: float = 1.0

    def nested_dims(self, dimensions: int) -> list[tuple[int, float]]:
        """(m, share of the loss) of every Matryoshka size; without them, all dimensions."""
        dims = list(self.matryoshka_dims or [dimensions])
        weights = list(self.matryoshka_weights or [1.0] * len(dims))
        return [(m, weight / sum(weights)) for m, weight in zip(dims, weights, strict=True)]


@dataclass(frozen=True)
class ContrastRows:
    """Which documents are whose. They lie in the step's order: row 0's positive and negatives, row 1's positive, …"""

    first: Sequence[int]
    """(G + 1,) row i's own documents are first[i] … first[i + 1] - 1, and p(i) = first[i]."""
    known_positives: torch.Tensor
    """(2, P) int64, CPU: (row, document) pairs of the same text as a known positive of the row's query."""
    languages: torch.Tensor | None = None
    """(G,) int64, the language of each row, for `same_language`."""
    scores: torch.Tensor | None = None
    """(N,) a teacher's scores of each row's own documents."""

    @property
    def num_rows(self) -> int:
        return len(self.first) - 1


class ContrastCounts(NamedTuple):
    """Sums over rows or candidates of a step, on the device; `metrics` makes shares and means of them."""

    rows: torch.Tensor
    accurate: torch.Tensor  # rows whose positive is the most similar candidate that is no known positive
    positive: torch.Tensor  # sum of s_ip
    hard: torch.Tensor  # sum of s_ic over H_i
    num_hard: torch.Tensor
    in_batch: torch.Tensor  # sum of s_ic over candidates that are not i's own
    num_in_batch: torch.Tensor
    candidates: torch.Tensor  # all but p(i)
    known: torch.Tensor  # of these, dropped as the text of a known positive
    dropped: torch.Tensor  # of these, dropped by the margin
    near: torch.Tensor  # of these, within NEAR_THRESHOLD of the margin's threshold

    def metrics(self) -> dict[str, float]:
        """Waits for the device."""
        n = dict(zip(self._fields, torch.stack(list(self)).tolist(), strict=True))
        return {
            "accuracy": n["accurate"] / n["rows"],
            "positive_similarity": n["positive"] / n["rows"],
            "hard_negative_similarity": n["hard"] / max(1, n["num_hard"]),
            "in_batch_negative_similarity": n["in_batch"] / max(1, n["num_in_batch"]),
            "dropped_share": (n["known"] + n["dropped"]) / max(1, n["candidates"]),
            "dropped_by_margin_share": n["dropped"] / max(1, n["candidates"]),
            "near_threshold": n["near"],
        }


class ContrastStep(NamedTuple):
    """The loss of a step and what flows back."""

    loss: torch.Tensor
    query_gradients: torch.Tensor  # (G, D) dL / de(q_i)
    document_gradients: torch.Tensor  # (N, D) dL / de(d_c)
    counts: ContrastCounts


def contrastive_loss(
    queries: torch.Tensor,
    documents: torch.Tensor,
    rows: ContrastRows,
    settings: ContrastSettings,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk_scores: int = CHUNK_SCORES,
) -> ContrastStep:
    """Loss and gradients of one step.

    Args:
        queries: (G, D) embeddings, not normalised; no graph is needed.
        documents: (N, D) embeddings in the order that `rows` describes.
        guide: the guide model's (G, D') and (N, D') embeddings; None: the model guides itself, size by size.
        chunk_scores: query-document scores that are formed at once.
    """
    precise = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries, documents = queries.detach().to(precise), documents.detach().to(precise)
    guides = None if guide is None else tuple(F.normalize(side.detach().to(precise), dim=1) for side in guide)
    total = torch.zeros((), dtype=precise, device=queries.device)
    gradients = torch.zeros_like(queries), torch.zeros_like(documents)
    dims = settings.nested_dims(queries.shape[1])
    widest = max(m for m, _ in dims)
    counts = torch.zeros(len(ContrastCounts._fields), dtype=torch.float64, device=queries.device)
    for m, share in dims:
        q, d = F.normalize(queries[:, :m], dim=1), F.normalize(documents[:, :m], dim=1)
        dq, dd = torch.zeros_like(q), torch.zeros_like(d)
        for chunk in _chunks(rows, settings, chunk_scores, queries.device):
            i, c = chunk.rows, chunk.documents
            s = q[i] @ d[c].T  # (B, C)
            g = s if guides is None else guides[0][i] @ guides[1][c].T
            loss, ds, sums = _chunk_loss(s, g, chunk, settings)
            total += share * loss / rows.num_rows
            ds *= share / rows.num_rows
            dq[i] += ds @ d[c]
            dd[c] += ds.T @ q[i]
            if m == widest:
                counts += sums
        gradients[0][:, :m] += _through_normalisation(dq, q, queries[:, :m])
        gradients[1][:, :m] += _through_normalisation(dd, d, documents[:, :m])
    if settings.kd_weight:
        total += settings.kd_weight * _distil(queries, documents, rows, settings, gradients)
    return ContrastStep(total, *gradients, ContrastCounts(*counts))


class _Chunk(NamedTuple):
    """Some rows and all documents that may be their candidates; masks are (B, C), or broadcast to it."""

    rows: slice
    documents: slice
    positive: torch.Tensor  # (B, 1) int64: the column of p(i)
    is_positive: torch.Tensor  # c = p(i)
    own: torch.Tensor  # c is p(i) or in H_i
    explicit: torch.Tensor  # (1, C): c is some row's negative
    candidate: torch.Tensor
    known: torch.Tensor  # c != p(i) is the text of a known positive


def _chunks(
    rows: ContrastRows, settings: ContrastSettings, chunk_scores: int, device: torch.device
) -> Iterator[_Chunk]:
    """The step's rows in order, block by block; within a block in chunks of about `chunk_scores` scores."""
    alone = settings.in_batch_negatives == "none"
    group = settings.negatives_group_size or rows.num_rows
    for block in range(0, rows.num_rows, group):
        block_end = min(block + group, rows.num_rows)
        width = rows.first[block_end] - rows.first[block]
        num = _ROWS_ALONE if alone else max(1, chunk_scores // width)
        for begin in range(block, block_end, num):
            end = min(begin + num, block_end)
            yield _chunk(rows, settings, (begin, end), (begin, end) if alone else (block, block_end), device)


def _chunk(
    rows: ContrastRows, settings: ContrastSettings, span: tuple[int, int], block: tuple[int, int], device: torch.device
) -> _Chunk:
    """The masks of rows `span` with the documents of rows `block`."""
    (begin, end), lo, hi = span, rows.first[block[0]], rows.first[block[1]]
    first = torch.tensor(rows.first[block[0] : block[1] + 1]) - lo  # of the block's rows, in its columns
    owner = torch.repeat_interleave(torch.arange(*block), first.diff()).to(device)[None]  # (1, C)
    column = torch.arange(hi - lo, device=device)[None]
    first = first.to(device)
    i = torch.arange(begin, end, device=device)[:, None]
    positive = first[i - block[0]]
    own, is_positive = owner == i, column == positive
    candidate = own if settings.in_batch_negatives == "none" else torch.ones_like(own)
    if settings.in_batch_negatives == "same_language":
        if rows.languages is None:
            raise ValueError("same_language needs the rows' languages")
        languages = rows.languages.to(device)
        candidate = languages[owner] == languages[i]
    known_rows, known_documents = rows.known_positives
    inside = (known_rows >= begin) & (known_rows < end) & (known_documents >= lo) & (known_documents < hi)
    known = torch.zeros_like(own)
    known[(known_rows[inside] - begin).to(device), (known_documents[inside] - lo).to(device)] = True
    known &= candidate & ~is_positive
    explicit = first[owner - block[0]] != column
    return _Chunk(slice(begin, end), slice(lo, hi), positive, is_positive, own, explicit, candidate, known)


def _chunk_loss(
    s: torch.Tensor, g: torch.Tensor, chunk: _Chunk, settings: ContrastSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, C) cosines -> sum of the rows' losses, its gradient (B, C) by s, and the sums of `ContrastCounts`."""
    others = chunk.candidate & ~chunk.is_positive & ~chunk.known
    dropped, near = _dropped(g, chunk, settings, others)
    kept = others & ~dropped | chunk.is_positive
    z = s / settings.temperature
    if settings.hardness_mode is not None:
        z += settings.hardness_strength * s * _hardened(chunk, settings.hardness_mode)
    z.masked_fill_(~kept, float("-inf"))
    log_normaliser = z.logsumexp(dim=1, keepdim=True)  # (B, 1)
    loss = (log_normaliser - z.gather(1, chunk.positive)).sum()
    ds = (z - log_normaliser).exp_()  # softmax(z_i)
    ds.scatter_add_(1, chunk.positive, ds.new_full((len(ds), 1), -1.0))
    ds /= settings.temperature
    return loss, ds, _sums(s, chunk, others, dropped, near)


def _dropped(
    g: torch.Tensor, chunk: _Chunk, settings: ContrastSettings, others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C) candidates the guide takes for positives, and those near its threshold."""
    if settings.margin_strategy is None:
        nothing = torch.zeros_like(others)
        return nothing, nothing
    g_ip = g.gather(1, chunk.positive)
    absolute = settings.margin_strategy == "absolute"
    threshold = g_ip - settings.margin if absolute else g_ip * (1 - settings.margin)
    return (g > threshold) & others, ((g - threshold).abs() < NEAR_THRESHOLD) & others


def _hardened(chunk: _Chunk, mode: HardnessMode) -> torch.Tensor:
    """(B, C) the candidates whose logits are raised by their similarity."""
    if mode == "hard_negatives":
        return chunk.own & ~chunk.is_positive
    if mode == "explicit_negatives":
        return chunk.explicit.expand_as(chunk.own)
    if mode == "in_batch_negatives":
        return ~chunk.own
    return ~chunk.is_positive


def _sums(
    s: torch.Tensor, chunk: _Chunk, others: torch.Tensor, dropped: torch.Tensor, near: torch.Tensor
) -> torch.Tensor:
    """(11,) float64, in the order of `ContrastCounts`."""
    s_ip = s.gather(1, chunk.positive)
    hard, in_batch = chunk.own & ~chunk.is_positive, chunk.candidate & ~chunk.own
    best_other = s.masked_fill(~others, float("-inf")).amax(dim=1, keepdim=True)
    rows = torch.tensor(float(len(s)), device=s.device)
    sums = (
        rows,
        (s_ip >= best_other).sum(),
        s_ip.sum(dtype=torch.float64),
        (s * hard).sum(dtype=torch.float64),
        hard.sum(),
        (s * in_batch).sum(dtype=torch.float64),
        in_batch.sum(),
        chunk.candidate.sum() - rows,
        chunk.known.sum(),
        dropped.sum(),
        near.sum(),
    )
    return torch.stack([value.double() for value in sums])


def _distil(
    queries: torch.Tensor,
    documents: torch.Tensor,
    rows: ContrastRows,
    settings: ContrastSettings,
    gradients: tuple[torch.Tensor, torch.Tensor],
    chunk_rows: int = 256,
) -> torch.Tensor:
    """Mean over rows of KL(teacher || model) over a row's own documents; adds kd_weight x its gradient."""
    if rows.scores is None:
        raise ValueError("distillation needs the rows' teacher scores")
    device, tau = queries.device, settings.kd_temperature
    q, d = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    dq, dd = torch.zeros_like(q), torch.zeros_like(d)
    first = torch.as_tensor(rows.first, dtype=torch.int64, device=device)
    counts = first.diff()
    teacher = rows.scores.to(device=device, dtype=q.dtype)
    total = torch.zeros((), dtype=q.dtype, device=device)
    place = torch.arange(int(counts.max()), device=device)[None]  # (1, K)
    for begin in range(0, rows.num_rows, chunk_rows):
        i = slice(begin, min(begin + chunk_rows, rows.num_rows))
        own = place < counts[i, None]  # (B, K)
        c = first[:-1][i, None] + place.where(own, 0)
        s = torch.einsum("bd,bkd->bk", q[i], d[c])
        log_student = (s / tau).masked_fill(~own, float("-inf")).log_softmax(dim=1).masked_fill(~own, 0)
        log_teacher = (teacher[c] / tau).masked_fill(~own, float("-inf")).log_softmax(dim=1).masked_fill(~own, 0)
        target = log_teacher.exp() * own
        total += (target * (log_teacher - log_student)).sum() / rows.num_rows
        ds = (log_student.exp() * own - target) * (settings.kd_weight / (tau * rows.num_rows))
        dq[i] += torch.einsum("bk,bkd->bd", ds, d[c])
        dd.index_put_((c[own],), ds[own][:, None] * q[i][own.nonzero()[:, 0]], accumulate=True)
    gradients[0].add_(_through_normalisation(dq, q, queries))
    gradients[1].add_(_through_normalisation(dd, d, documents))
    return total


def _through_normalisation(gradient: torch.Tensor, unit: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """dL / de of e / |e| = unit, given dL / dunit, all (n, D)."""
    radial = (gradient * unit).sum(dim=1, keepdim=True)
    norm: torch.Tensor = raw.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (gradient - unit * radial) / norm
