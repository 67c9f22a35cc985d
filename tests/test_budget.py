"""Token budget and checkpointing, table by table; hand arithmetic of communication and disk."""

from __future__ import annotations

from typing import Any

import pytest

from anchor_cli.plan.budget import choose_budget, fewest_micro_batches
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import LayerOptions, largest_budget, training_memory
from anchor_cli.plan.zero import StateOptions, state_options
from anchor_cli.spec.deepspeed import load_ds_config
from anchor_cli.spec.spec import RunSpec

SHAPE = ModelShape(1024, 3072, 28, 16, 8, 128, 151936, True, True, False)
TWO = StateOptions(2, 4, 4, world_size=2, bucket=200_000_000)
GIB = 2**30


def spec(**keys: Any) -> RunSpec:
    return RunSpec(model_name_or_path="m", dataset_file_path="d", **keys)


def test_budget_of_kure_on_two_h100_nvl_by_hand() -> None:
    """What remains of 90 % of 94 GiB, in bytes, over what two passes keep of a token; Qwen3-0.6B in bf16, ZeRO-2."""
    parameters, table = 596_049_920, 151_936 * 1024
    states = 2 * parameters + (4 + 12) * parameters // 2
    reduction = 200_000_000 * (2 + 2 + 4)  # a bucket and its flat copy in bf16, a copy in fp32
    chunk = 2**28 * (4 + 2) + table * (4 + 2)  # 1 GiB of fp32 logits and as many in bf16; the table's gradient
    # one layer of a token: two norms (fp32 input, normed, output, and fp32 scale), norms of 16 + 8 heads of 128 (the
    # same), q, k, v and output of attention with its fp32 log-sum, and gate, silu, up and product of the MLP
    layer = (
        2 * ((4 + 2 + 2) * 1024 + 4) + (4 + 2) * 3072 + 4 * 24 + 2 * (2048 + 2 * 1024 + 2048) + 4 * 16 + 4 * 2 * 3072
    )
    token = 28 * layer + (4 + 2) * 1024 + 4 + 2 * 2 * 128 + 8
    fits = (0.9 * 94 * GIB - states - reduction - chunk - 1.5e9) / (2 * token)
    got = choose_budget(spec(), SHAPE, TWO, 94 * GIB, 1024)
    assert got.tokens == int(fits) // 1024 * 1024 == 19_456
    assert (got.checkpointing, got.checkpointing_source) == (False, "auto: fits without")


def test_auto_checkpoints_only_where_memory_needs_it() -> None:
    small = choose_budget(spec(), SHAPE, TWO, 24 * GIB, 1024)
    assert (small.checkpointing, small.checkpointing_source) == (True, "auto: memory needs it")
    assert training_memory(SHAPE, TWO, LayerOptions(checkpointing=True), small.tokens).total <= 0.9 * 24 * GIB


def test_the_spec_is_obeyed() -> None:
    strict = spec(gradient_checkpointing=False, max_tokens_per_micro_batch=4096)
    told = choose_budget(strict, SHAPE, TWO, 24 * GIB, 1024)
    assert (told.tokens, told.source) == (4096, "the spec")
    assert (told.checkpointing, told.checkpointing_source) == (False, "the spec")
    told = choose_budget(spec(gradient_checkpointing=True), SHAPE, TWO, 94 * GIB, 1024)
    assert told.checkpointing and told.checkpointing_source == "the spec"


def test_auto_checkpointing_looks_at_a_given_budget() -> None:
    fits = largest_budget(SHAPE, TWO, LayerOptions(), 94 * GIB)
    assert not choose_budget(spec(max_tokens_per_micro_batch=fits), SHAPE, TWO, 94 * GIB, 1024).checkpointing
    assert choose_budget(spec(max_tokens_per_micro_batch=fits + 1), SHAPE, TWO, 94 * GIB, 1024).checkpointing


@pytest.mark.parametrize(("longest", "want"), [(1024, 8192), (10000, 10000)])
def test_on_a_cpu(longest: int, want: int) -> None:
    got = choose_budget(spec(), None, TWO, None, longest)
    assert (got.tokens, got.checkpointing) == (want, False)


def test_liger_leaves_room_for_more_tokens() -> None:
    plain, fused = (choose_budget(spec(), SHAPE, TWO, 94 * GIB, 1024, fused=way).tokens for way in ("none", "liger"))
    assert fused > plain


def test_kure_at_length_512_is_one_micro_batch_on_80_and_94_gb() -> None:
    """64 pairs a card, heaviest 29,254 tokens (docs/performance.md). What compiled layers keep of a token, by hand."""
    parameters, table = 596_049_920, 151_936 * 1024
    fixed = 2 * parameters + (4 + 12) * parameters // 2 + 200_000_000 * 8 + 2**28 * 6 + table * 6 + 1.5e9
    # inputs and outputs of two norms and their scales; q and k before and after their norms and rotation, 24 scales of
    # heads; v, attention's output and its log-sums; gate, up and product
    layer = 2 * (4 * 1024 + 3 * 2048 + 3 * 1024 + 3 * 3072) + 2 * 4 + 24 * 4 + 16 * 4
    rest = 2 * 1024 + 4 + 2 * 2 * 128 + 8
    for gib, selective in ((94, False), (80, True)):
        kept = 28 * (layer - selective * 2 * (1024 + 3072)) + rest
        made = choose_budget(spec(), SHAPE, TWO, gib * GIB, 1024, fused="compiled")
        got = fewest_micro_batches(made, lambda tokens: -(-29_254 // tokens))
        assert got.tokens == int((0.9 * gib * GIB - fixed) / (2 * kept)) // 1024 * 1024 >= 29_254
        assert (got.checkpointing, got.selective) == (False, selective)
    assert "norm and product" in got.checkpointing_source and made.checkpointing_source == "auto: fits without"


def test_compiled_layers_recompute_the_cheap_part_before_whole_layers() -> None:
    """For a given budget between what fits without and what fits with it; never where the spec says no."""
    fits = {way: largest_budget(SHAPE, TWO, LayerOptions(fused="compiled", selective=way), 80 * GIB) for way in (0, 1)}
    for tokens, want in ((fits[0], (False, False)), (fits[1], (False, True)), (fits[1] + 1, (True, False))):
        got = choose_budget(spec(max_tokens_per_micro_batch=tokens), SHAPE, TWO, 80 * GIB, 1024, fused="compiled")
        assert (got.checkpointing, got.selective) == want and got.alternative is None
    got = choose_budget(spec(gradient_checkpointing=False), SHAPE, TWO, 80 * GIB, 1024, fused="compiled")
    assert (got.tokens, got.alternative) == (fits[0], None)


def test_the_kernel_that_will_run_is_counted() -> None:
    """One call a text keeps keys and values of all heads; fp32 has no flash kernel, whatever the spec asks for."""
    want = largest_budget(SHAPE, TWO, LayerOptions(kernel="sdpa"), 94 * GIB)
    assert want < largest_budget(SHAPE, TWO, LayerOptions(), 94 * GIB)
    for told, kernel in ((spec(), "sdpa"), (spec(attn_implementation="sdpa"), None)):
        assert choose_budget(told, SHAPE, TWO, 94 * GIB, 1024, kernel=kernel).tokens == want
    fp32 = StateOptions(4, 4, 4, world_size=2)
    got = choose_budget(spec(precision="float32"), SHAPE, fp32, 94 * GIB, 1024).tokens
    assert got == largest_budget(SHAPE, fp32, LayerOptions(kernel="sdpa"), 94 * GIB)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("zero2_bf16", (2, 4, 4, 2, False)),
        ("zero1_bf16", (2, 4, 4, 1, False)),
        ("zero3_bf16", (2, 4, 4, 3, False)),
        ("zero2_offload_bf16", (2, 4, 4, 2, True)),
    ],
)
def test_states_of_the_shipped_configs(name: str, want: tuple[int, int, int, int, bool]) -> None:
    got = state_options(spec(deepspeed=name), load_ds_config(name, "."), 2)
    bytes_each = (got.bytes_per_value, got.gradient_bytes, got.communication_bytes)
    assert (*bytes_each, got.zero_stage, got.offload_optimizer) == want and got.world_size == 2


def test_fp32_config() -> None:
    got = state_options(spec(precision="float32"), load_ds_config("zero2_fp32", "."), 1)
    assert (got.bytes_per_value, got.gradient_bytes, got.communication_bytes) == (4, 4, 4)
