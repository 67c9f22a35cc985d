"""The loss is right: packed loss and all gradients against a naive loop, one pair at a time, stock SDPA, no packing."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.backbone import checkpoint_activations
from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.pooling import prune_last_layer
from anchor_cli.model.reconstruction import ReconstructionModel

EOS = 7
VOCABULARY = 97
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
Pair = tuple[np.ndarray, np.ndarray, int, int]  # query ids, document ids, their content starts


def tiny(dtype: torch.dtype, *, tied: bool = True, attention: str = PACKED_ATTENTION) -> Qwen3ForCausalLM:
    register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        initializer_range=0.3, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype)


def random_pairs(count: int, seed: int, shortest: int = 5, longest: int = 40) -> list[Pair]:
    """Texts of mixed length that end in [EOS]; some hold [EOS] ids inside, as special-token strings in content do."""
    rng = np.random.default_rng(seed)

    def text() -> np.ndarray:
        ids = rng.integers(8, VOCABULARY, rng.integers(shortest, longest)).astype(np.int32)
        if rng.random() < 0.3:
            ids[rng.integers(3, len(ids))] = EOS
        return np.append(ids, np.int32(EOS))

    return [(text(), text(), int(rng.integers(1, 5)), 3) for _ in range(count)]


def naive_losses(
    model: Qwen3ForCausalLM, pairs: Sequence[Pair], targets: str, d2q: float, q2d: float
) -> tuple[torch.Tensor, float, float]:
    """Design §2 read aloud, one pair at a time: (step loss with gradient, mean D2Q, mean Q2D)."""

    def embedding(ids: np.ndarray) -> torch.Tensor:
        return model.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, -1]

    def reconstruction(ids: np.ndarray, content_start: int, e: torch.Tensor) -> list[torch.Tensor]:
        tokens = torch.from_numpy(ids.astype(np.int64))
        n = len(tokens)
        inputs = torch.cat([e[None], model.model.embed_tokens(tokens[: n - 2])])  # [e, E(t_1), …, E(t_{n-2})]
        logits = model.lm_head(model.model(inputs_embeds=inputs[None]).last_hidden_state[0])
        losses = []
        for k in range(1, n):  # output k predicts t_k
            is_content = content_start <= k - 1 < n - 1
            if tokens[k - 1] != EOS and (targets == "text" or is_content):
                losses.append(F.cross_entropy(logits[k - 1], tokens[k - 1]))
        return losses

    query_losses, document_losses = [], []
    for query, document, query_start, document_start in pairs:
        query_losses += reconstruction(query, query_start, embedding(document))
        document_losses += reconstruction(document, document_start, embedding(query))
    mean_d2q, mean_q2d = torch.stack(query_losses).mean(), torch.stack(document_losses).mean()
    return d2q * mean_d2q + q2d * mean_q2d, mean_d2q.item(), mean_q2d.item()


def packed_losses(
    model: ReconstructionModel, micro_batches: Sequence[Sequence[Pair]], targets: str, d2q: float, q2d: float
) -> tuple[float, float, float]:
    """Accumulates gradients over micro-batches of one step and returns (loss, mean D2Q, mean Q2D)."""
    batches = [
        pack_pairs(
            [p[0] for p in pairs], [p[1] for p in pairs], np.array([p[2] for p in pairs]),
            np.array([p[3] for p in pairs]), eos_token_id=EOS, targets=targets,
        )
        for pairs in micro_batches
    ]  # fmt: skip
    query_targets = sum(b.num_query_targets for b in batches)
    document_targets = sum(len(b.target_ids) - b.num_query_targets for b in batches)
    total, d2q_sum, q2d_sum = 0.0, 0.0, 0.0
    for batch in batches:
        out = model(batch, d2q / query_targets, q2d / document_targets)
        out.loss.backward()
        total += out.loss.item()
        d2q_sum += out.d2q_sum.item()
        q2d_sum += out.q2d_sum.item()
    return total, d2q_sum / query_targets, q2d_sum / document_targets


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert torch.isfinite(got).all()
    assert (got - want).norm() <= relative * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("targets", ["text", "content"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_packed_loss_and_gradients_equal_a_naive_loop(
    dtype: torch.dtype, targets: str, tied: bool, pruned: bool
) -> None:
    pairs = random_pairs(7, seed=3)
    plain = tiny(dtype, tied=tied, attention="sdpa")
    ours = ReconstructionModel(tiny(dtype, tied=tied), kernel="sdpa", chunk_targets=13)
    if pruned:  # and checkpointed, half of the time
        assert prune_last_layer(ours.language_model)
        if tied:
            checkpoint_activations(ours.language_model)
    want_loss, want_d2q, want_q2d = naive_losses(plain, pairs, targets, 0.8, 0.2)
    want_loss.backward()
    # three micro-batches of unlike size: how a step is cut must not matter
    got_loss, got_d2q, got_q2d = packed_losses(ours, [pairs[:1], pairs[1:5], pairs[5:]], targets, 0.8, 0.2)
    relative = TOLERANCE[dtype]
    assert got_loss == pytest.approx(want_loss.item(), rel=relative)
    assert got_d2q == pytest.approx(want_d2q, rel=relative)
    assert got_q2d == pytest.approx(want_q2d, rel=relative)
    gradients = dict(ours.language_model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and gradients[name].grad is not None, name
        assert_close(gradients[name].grad, parameter.grad, relative)


def test_gradient_flows_through_the_embedding() -> None:
    """With the reconstructed text cut to its first token the only path to the encoder is e itself."""
    pair: Pair = (np.array([9, EOS]), np.array([11, EOS]), 0, 0)
    model = ReconstructionModel(tiny(torch.float64), kernel="sdpa")
    packed_losses(model, [[pair]], "text", 0.8, 0.2)
    gradient = model.language_model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient[EOS].norm() > 0


def test_gradient_checkpointing_changes_no_gradient() -> None:
    pairs = random_pairs(4, seed=5)
    plain = ReconstructionModel(tiny(torch.float64), kernel="sdpa")
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed.language_model)
    checkpointed.train()
    packed_losses(plain, [pairs], "text", 0.8, 0.2)
    packed_losses(checkpointed, [pairs], "text", 0.8, 0.2)
    for want, got in zip(plain.parameters(), checkpointed.parameters()):
        assert_close(got.grad, want.grad, 1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    pairs = random_pairs(3, seed=8)
    want, got = (
        packed_losses(ReconstructionModel(tiny(torch.float64), kernel="sdpa", chunk_targets=c), [pairs], "text", 1, 1)
        for c in (7, chunk)
    )
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_embedding_is_the_same_alone_in_any_batch_and_at_any_position(dtype: torch.dtype) -> None:
    from anchor_cli.model.packed import pack_texts

    model = ReconstructionModel(tiny(dtype), kernel="sdpa").eval()
    stock = tiny(dtype, attention="sdpa")
    texts = [p[0] for p in random_pairs(12, seed=11, longest=90)]
    with torch.no_grad():
        alone = [stock.model(torch.from_numpy(t.astype(np.int64))[None]) for t in texts]
        want = torch.stack([out.last_hidden_state[0, -1] for out in alone])
        for order in (range(12), reversed(range(12)), np.random.default_rng(0).permutation(12)):
            order = list(order)
            got = model.encode(pack_texts([texts[i] for i in order]))
            for row, i in enumerate(order):
                assert_close(got[row], want[i], TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["eos_token", "last_token", "mean"])
def test_a_pruned_last_layer_gives_the_same_embeddings_in_fewer_rows(mode: str) -> None:
    from anchor_cli.model.packed import pack_texts

    whole, pruned = (ReconstructionModel(tiny(torch.float64), kernel="sdpa", pooling_mode=mode) for _ in range(2))
    rows: list[int] = []
    assert prune_last_layer(pruned.language_model)
    pruned.language_model.model.layers[-1].mlp.register_forward_hook(lambda *call: rows.append(call[2].shape[1]))
    texts, starts = pack_texts([p[0] for p in random_pairs(5, seed=2)]), torch.tensor([1] * 5)
    assert_close(pruned.encode(texts, starts), whole.encode(texts, starts), 1e-12)
    assert rows == [len(texts.input_ids) if mode == "mean" else 5]


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token"])
def test_pooling_takes_content_tokens_only(mode: str) -> None:
    from anchor_cli.model.packed import pack_texts
    from anchor_cli.model.pooling import pool

    lengths, starts = [6, 9, 5], [3, 2, 3]
    hidden = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    texts = pack_texts([np.arange(n, dtype=np.int32) for n in lengths])
    got = pool(hidden, texts.cu_seqlens, torch.tensor(starts), mode)
    offset = 0
    for row, (n, start) in enumerate(zip(lengths, starts)):
        content = hidden[offset + start : offset + n - 1]
        weights = {
            "mean": torch.ones(len(content)),
            "weighted_mean": torch.arange(1, len(content) + 1),
            "last_token": torch.tensor([0] * (len(content) - 1) + [1]),
        }[mode].to(torch.float64)
        want = (content * (weights / weights.sum())[:, None]).sum(0)
        torch.testing.assert_close(got[row], want)
        offset += n


@pytest.mark.parametrize("mode", ["mean", "weighted_mean"])
def test_the_mean_of_no_content_is_zeros_and_not_nan(mode: str) -> None:
    from anchor_cli.export.pooling import ContentPooling
    from anchor_cli.model.packed import pack_texts
    from anchor_cli.model.pooling import pool

    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    texts = pack_texts([np.arange(n, dtype=np.int32) for n in (4, 5)])
    got = pool(hidden, texts.cu_seqlens, torch.tensor([3, 3]), mode)  # the first text: template and [EOS] alone
    assert got[0].tolist() == [0.0] * 4
    torch.testing.assert_close(got[1], hidden[7])
    features = {
        "token_embeddings": hidden[None, :3], "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "input_ids": torch.tensor([[1, 2, 3]]), "prompt_length": 3,
    }  # fmt: skip
    exported = ContentPooling(4, mode, []).forward(features)["sentence_embedding"]
    assert exported.tolist() == [[0.0] * 4]
