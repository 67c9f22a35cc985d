"""Stage II's loss and every gradient against a loop written here, two other libraries, and hand arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from anchor_cli.model.contrast import ContrastRows, ContrastSettings, ContrastStep, contrastive_loss

D = 12


def a_step(num_negatives: list[int], seed: int = 0, scores: bool = False) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(queries, documents, rows) in float64; positives resemble their queries, some texts are known positives."""
    generator = torch.Generator().manual_seed(seed)
    first = [0]
    for num in num_negatives:
        first.append(first[-1] + 1 + num)
    queries = torch.randn(len(num_negatives), D, generator=generator, dtype=torch.float64)
    documents = torch.randn(first[-1], D, generator=generator, dtype=torch.float64)
    for i, c in enumerate(first[:-1]):
        documents[c] += queries[i]
    other = first[1]  # row 1's positive is one of row 0's, too; and row 2's own positive is listed, as it may be
    known = torch.tensor([[0, 2], [other, first[2]]])
    languages = torch.tensor([i % 2 for i in range(len(num_negatives))])
    teacher = torch.randn(first[-1], generator=generator, dtype=torch.float64) if scores else None
    return queries, documents, ContrastRows(first, known, languages, teacher)


def naive(q: Any, d: Any, rows: ContrastRows, settings: ContrastSettings, guide: Any = None) -> torch.Tensor:
    """The formula, one pair at a time, differentiated by autograd."""

    def cos(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b) / (a.norm() * b.norm())

    num_rows, first = len(rows.first) - 1, rows.first
    row_of = {c: i for i in range(num_rows) for c in range(first[i], first[i + 1])}
    known = {(int(i), int(c)) for i, c in rows.known_positives.T}
    group = settings.negatives_group_size or num_rows
    dims = settings.matryoshka_dims or [q.shape[1]]
    weights = settings.matryoshka_weights or [1.0] * len(dims)
    total = torch.zeros((), dtype=torch.float64)
    for m, weight in zip(dims, weights, strict=True):
        for i in range(num_rows):
            p = first[i]
            exps = []
            for c in range(len(d)):
                j = row_of[c]
                if i // group != j // group or (settings.in_batch_negatives == "none" and i != j):
                    continue
                if settings.in_batch_negatives == "same_language" and rows.languages[i] != rows.languages[j]:
                    continue
                s = cos(q[i, :m], d[c, :m])
                g, g_p = (
                    (s.detach(), cos(q[i, :m], d[p, :m]).detach())
                    if guide is None
                    else (cos(guide[0][i], guide[1][c]), cos(guide[0][i], guide[1][p]))
                )
                if c != p:
                    if (i, c) in known:
                        continue
                    if settings.margin_strategy == "absolute" and g > g_p - settings.margin:
                        continue
                    if settings.margin_strategy == "relative" and g > g_p * (1 - settings.margin):
                        continue
                hardened = {
                    None: False,
                    "hard_negatives": i == j and c != p,
                    "explicit_negatives": c != first[j],
                    "in_batch_negatives": i != j,
                    "all_negatives": c != p,
                }[settings.hardness_mode]
                z = s / settings.temperature + (settings.hardness_strength * s.detach() if hardened else 0.0)
                exps.append(z)
                if c == p:
                    z_p = z
            row_loss = torch.logsumexp(torch.stack(exps), 0) - z_p
            total = total + weight / sum(weights) * row_loss / num_rows
    if settings.kd_weight:
        for i in range(num_rows):
            s = torch.stack([cos(q[i], d[c]) for c in range(first[i], first[i + 1])])
            teacher = torch.softmax(rows.scores[first[i] : first[i + 1]] / settings.kd_temperature, 0)
            student = torch.softmax(s / settings.kd_temperature, 0)
            total = total + settings.kd_weight * (teacher * (teacher.log() - student.log())).sum() / num_rows
    return total


def naive_gradients(q: Any, d: Any, rows: Any, settings: Any, guide: Any = None) -> tuple[torch.Tensor, ...]:
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    loss = naive(q, d, rows, settings, guide)
    return loss.detach(), *torch.autograd.grad(loss, (q, d))


NONE, VARYING, SEVEN = [0] * 7, [3, 1, 0, 7, 2, 5, 4], [7] * 6
MODES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "no negatives": (NONE, {}),
    "varying negatives": (VARYING, {}),
    "seven negatives": (SEVEN, {}),
    "blocks": (VARYING, {"negatives_group_size": 3}),
    "same language": (VARYING, {"in_batch_negatives": "same_language"}),
    "own documents only": (VARYING, {"in_batch_negatives": "none"}),
    "hard negatives": (VARYING, {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
    "explicit negatives": (VARYING, {"hardness_mode": "explicit_negatives", "hardness_strength": 5.0}),
    "in-batch negatives": (VARYING, {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}),
    "all negatives": (VARYING, {"hardness_mode": "all_negatives", "hardness_strength": 2.0}),
    "absolute margin": (VARYING, {"margin_strategy": "absolute", "margin": 0.05}),
    "absolute margin below zero": (SEVEN, {"margin_strategy": "absolute", "margin": -0.1}),
    "relative margin": (VARYING, {"margin_strategy": "relative", "margin": 0.4}),
    "Matryoshka": (VARYING, {"matryoshka_dims": [D, 8, 3], "matryoshka_weights": [1.0, 0.5, 0.25]}),
    "Matryoshka, margin": (VARYING, {"matryoshka_dims": [D, 5], "margin_strategy": "absolute"}),
    "distillation": (VARYING, {"kd_weight": 0.7, "kd_temperature": 0.5}),
    "all at once": (
        VARYING,
        {
            "negatives_group_size": 4,
            "in_batch_negatives": "same_language",
            "hardness_mode": "explicit_negatives",
            "hardness_strength": 5.0,
            "margin_strategy": "absolute",
            "margin": -0.1,
            "matryoshka_dims": [D, 6],
            "kd_weight": 0.3,
        },
    ),
}


@pytest.mark.parametrize("guided", ["by itself", "by another"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_every_gradient_equal_a_loop_over_pairs(mode: str, guided: str) -> None:
    num_negatives, keys = MODES[mode]
    settings = ContrastSettings(temperature=0.05, **keys)
    q, d, rows = a_step(num_negatives, scores=bool(settings.kd_weight))
    guide = None
    if guided == "by another":
        generator = torch.Generator().manual_seed(9)
        noise = lambda t: torch.cat([t, torch.randn(len(t), 4, generator=generator, dtype=t.dtype)], 1)  # noqa: E731
        guide = noise(q), noise(d)
    want = naive_gradients(q, d, rows, settings, guide)
    for chunk in (2**24, 40, 1):
        got = contrastive_loss(q, d, rows, settings, guide, chunk_scores=chunk)
        for ours, theirs in zip(got[:3], want, strict=True):
            assert (ours - theirs).abs().max() < 1e-9 * max(1.0, float(theirs.abs().max()))
    low = contrastive_loss(q.float(), d.float(), rows, settings, guide and tuple(t.float() for t in guide))
    for ours, theirs in zip(low[:3], want, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_the_modes_differ_from_one_another() -> None:
    """A mode that does nothing would pass a comparison with a loop that makes the same mistake."""
    q, d, rows = a_step(VARYING, scores=True)
    losses = {}
    for mode, (num_negatives, keys) in MODES.items():
        if num_negatives is VARYING:
            losses[mode] = float(contrastive_loss(q, d, rows, ContrastSettings(temperature=0.05, **keys)).loss)
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses), losses


def test_hardness_by_hand_arithmetic() -> None:
    """Two rows in the plane, one negative each: every cosine is known, so is every logit."""
    sixty = math.cos(math.pi / 3)
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # row 0: positive at 0 degrees, negative at 60; row 1: positive at 90, negative at 150 degrees
    documents = [[3.0, 0.0], [sixty, math.sin(math.pi / 3)], [0.0, 1.0], [-math.sin(math.pi / 3), sixty]]
    d = torch.tensor(documents, dtype=torch.float64)
    rows = ContrastRows([0, 2, 4], torch.zeros(2, 0, dtype=torch.int64))
    right = math.cos(math.pi / 2)  # 0, up to rounding
    # row 0: cos 0, 60, 90, 150; row 1: cos 90, 30, 0, 60
    cosines = [[1.0, 0.5, right, -math.sqrt(0.75)], [right, math.sqrt(0.75), 1.0, 0.5]]
    extra = {
        "hard_negatives": ([1], [3]),
        "explicit_negatives": ([1, 3], [1, 3]),
        "in_batch_negatives": ([2, 3], [0, 1]),
        "all_negatives": ([1, 2, 3], [0, 1, 3]),
    }
    for mode, hardened in extra.items():
        want = 0.0
        for i in (0, 1):
            z = [s / 0.5 + (4.0 * s if c in hardened[i] else 0.0) for c, s in enumerate(cosines[i])]
            want += (math.log(sum(map(math.exp, z))) - z[2 * i]) / 2
        settings = ContrastSettings(temperature=0.5, hardness_mode=mode, hardness_strength=4.0)  # type: ignore[arg-type]
        assert float(contrastive_loss(q, d, rows, settings).loss) == pytest.approx(want, abs=1e-12), mode


def theirs(loss_class: Any, q: torch.Tensor, d: torch.Tensor, num: int, guide: Any = None, **options: Any) -> float:
    """The value of a loss of sentence-transformers on given embeddings: columns query, positive, negative 1 …"""
    loss = loss_class.__new__(loss_class)
    torch.nn.Module.__init__(loss)
    if guide is None:
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        loss.loss = MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    else:
        loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
        loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
        loss.gather_across_devices = loss.contrast_anchors = loss.contrast_positives = False
        for name, value in options.items():
            setattr(loss, name, value)
    loss.mini_batch_size, loss.show_progress_bar = 3, False
    columns = lambda a, b: [[a], *([b[k :: num + 1]] for k in range(num + 1))]  # noqa: E731
    if guide is None:
        return float(loss.calculate_loss(columns(q, d)))
    return float(loss.calculate_loss(columns(q, d), columns(*guide)))


@pytest.mark.parametrize("num", [0, 1, 7])
@pytest.mark.parametrize("mode", [None, "hard_negatives", "in_batch_negatives", "all_negatives"])
def test_value_equals_cached_multiple_negatives_ranking_loss(num: int, mode: Any) -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    q, d, rows = a_step([num] * 6)
    rows = replace(rows, known_positives=torch.zeros(2, 0, dtype=torch.int64))
    settings = ContrastSettings(temperature=0.05, hardness_mode=mode, hardness_strength=5.0 if mode else 0.0)
    ours = contrastive_loss(q, d, rows, settings).loss
    options = {"scale": 20.0, "hardness_mode": mode, "hardness_strength": settings.hardness_strength}
    want = theirs(losses.CachedMultipleNegativesRankingLoss, q, d, num, **options)
    assert float(ours) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("num", [0, 1, 7])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", -0.1), ("absolute", 0.05), ("relative", 0.05)])
@pytest.mark.parametrize("by_itself", [True, False])
def test_value_equals_cached_gist_embed_loss(num: int, strategy: Any, margin: float, by_itself: bool) -> None:
    """Positives' cosines are above 0 here: below, `relative` there is g - |g| m, and here g (1 - m)."""
    losses = pytest.importorskip("sentence_transformers.losses")
    q, d, rows = a_step([num] * 6)
    rows = replace(rows, known_positives=torch.zeros(2, 0, dtype=torch.int64))
    noise = torch.randn(len(d), D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    guide = (q, d) if by_itself else (q, d + 0.5 * noise)
    settings = ContrastSettings(temperature=0.05, margin_strategy=strategy, margin=margin)
    ours = contrastive_loss(q, d, rows, settings, None if by_itself else guide)
    assert ours.counts.dropped > 0 or margin < 0 or num == 0
    options = {"temperature": 0.05, "margin_strategy": strategy, "margin": margin}
    want = theirs(losses.CachedGISTEmbedLoss, q, d, num, guide, **options)
    assert float(ours.loss) == pytest.approx(want, abs=1e-6)


def test_the_order_of_a_rows_negatives_changes_nothing() -> None:
    q, d, rows = a_step(VARYING, scores=True)
    settings = ContrastSettings(temperature=0.05, kd_weight=0.5, margin_strategy="absolute", margin=-0.1)
    order = torch.arange(len(d))
    for begin, end in zip(rows.first[:-1], rows.first[1:], strict=True):
        order[begin + 1 : end] = order[begin + 1 : end].flip(0)
    want = contrastive_loss(q, d, rows, settings)
    got = contrastive_loss(q, d[order], replace(rows, scores=rows.scores[order]), settings)
    assert float(got.loss) == pytest.approx(float(want.loss), abs=1e-13)
    assert torch.allclose(got.query_gradients, want.query_gradients, atol=1e-13)
    assert torch.allclose(got.document_gradients, want.document_gradients[order], atol=1e-13)


def test_metrics_count_what_they_say() -> None:
    """One dimension of freedom each: row 0's negative is nearer than its positive, row 1's text is known."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    d = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    rows = ContrastRows([0, 2, 3], torch.tensor([[1], [0]]))  # row 0: documents 0 and 1; row 1: document 2
    settings = ContrastSettings(temperature=1.0, margin_strategy="absolute", margin=-0.2)
    step: ContrastStep = contrastive_loss(q, d, rows, settings)
    got = step.counts.metrics()
    assert got["accuracy"] == 0.5
    assert got["positive_similarity"] == pytest.approx((0.8 + 1.0) / 2)
    assert got["hard_negative_similarity"] == pytest.approx(1.0)
    assert got["in_batch_negative_similarity"] == pytest.approx((0.0 + 0.6 + 0.0) / 3)
    # candidates: row 0: documents 1, 2; row 1: 0 (known), 1. 1.0 is not above 0.8 + 0.2 in float32? it lies on it
    assert got["near_threshold"] == 1
    assert got["dropped_share"] == pytest.approx((1 + float(step.counts.dropped)) / 4)
    nothing = contrastive_loss(q, d, rows, ContrastSettings(temperature=1.0)).counts.metrics()
    assert nothing["dropped_by_margin_share"] == 0 and nothing["dropped_share"] == 0.25


def test_memory_is_bounded_by_the_chunk() -> None:
    """No tensor of G x N scores: the largest one made has as many elements as a chunk, or an embedding matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    q, d, rows = a_step([7] * 256)
    with Largest() as largest:
        contrastive_loss(q, d, rows, ContrastSettings(), chunk_scores=2**15)
    assert largest.numel <= 2**15 < 256 * 2048


def test_what_is_missing_is_named() -> None:
    q, d, rows = a_step(VARYING)
    with pytest.raises(ValueError, match="teacher scores"):
        contrastive_loss(q, d, rows, ContrastSettings(kd_weight=1.0))
    with pytest.raises(ValueError, match="languages"):
        contrastive_loss(q, d, replace(rows, languages=None), ContrastSettings(in_batch_negatives="same_language"))
