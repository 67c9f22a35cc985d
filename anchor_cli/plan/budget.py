"""Token budget and gradient checkpointing of a run: one decision, made alike by `anchor plan` and by training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import CPU_TOKENS, EFFICIENT_TOKENS, LayerOptions, StateOptions, largest_budget
from anchor_cli.spec.spec import RunSpec

_DEFAULT_BUCKET = 500_000_000  # DeepSpeed 0.19's reduce_bucket_size


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, whether layers are recomputed, and why, in the person's words."""

    tokens: int
    source: str
    checkpointing: bool
    checkpointing_source: str


def expected_kernel(spec: RunSpec) -> str:
    """`flash` or `sdpa`: what a GPU will run, as far as the spec tells; there is no flash kernel in fp32."""
    return "sdpa" if spec.attn_implementation == "sdpa" or spec.precision == "float32" else "flash"


def choose_budget(
    spec: RunSpec,
    shape: ModelShape | None,
    options: StateOptions,
    device_bytes: float | None,
    longest_row: int,
    *,
    kernel: str | None = None,
    liger: bool = False,
) -> Budget:
    """What the spec says; where it leaves the choice, what fits into `device_bytes` (None: a CPU).

    Checkpointing costs one more forward pass, so `auto` takes it only if, without it, the budget (or, when that is open
    too, `EFFICIENT_TOKENS` and the longest row) does not fit. A chosen budget is never below the longest row.
    `kernel`: the one that will run, where that is known; else what the spec lets expect (fp32 has no flash kernel).
    """
    wish, given = spec.gradient_checkpointing, spec.max_tokens_per_micro_batch
    checkpointing, why = wish is True, "the spec"
    if device_bytes is None or shape is None:
        tokens, source = (given, "the spec") if given else (max(longest_row, CPU_TOKENS), "the CPU's default")
        return Budget(tokens, source, checkpointing, why if wish != "auto" else "auto: off on a CPU")
    if kernel is None:
        kernel = expected_kernel(spec)
    fitting = {
        recompute: largest_budget(shape, options, LayerOptions(recompute, kernel, liger), device_bytes)
        for recompute in (False, True)
    }
    if wish == "auto":
        checkpointing = fitting[False] < max(longest_row, given or EFFICIENT_TOKENS)
        why = "auto: memory needs it" if checkpointing else "auto: fits without"
    if given:
        return Budget(given, "the spec", checkpointing, why)
    return Budget(max(longest_row, fitting[checkpointing]), "what fits in memory", checkpointing, why)


def state_options(spec: RunSpec, ds_config: dict[str, Any], world_size: int) -> StateOptions:
    """What the DeepSpeed config, as written, says about where weights, gradients and optimizer live."""
    zero = ds_config.get("zero_optimization") or {}
    value_bytes = 2 if spec.precision == "bfloat16" else 4
    accumulate = (ds_config.get("data_types") or {}).get("grad_accum_dtype")
    bucket = zero.get("reduce_bucket_size")
    return StateOptions(
        bytes_per_value=value_bytes,
        gradient_bytes=4 if accumulate == "fp32" else value_bytes,
        communication_bytes=4 if ds_config.get("communication_data_type") == "fp32" else value_bytes,
        zero_stage=int(zero.get("stage", 0)),
        world_size=world_size,
        bucket=bucket if isinstance(bucket, int) else _DEFAULT_BUCKET,
        offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
    )
