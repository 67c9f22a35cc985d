"""Token budget and gradient checkpointing of a run: one decision, made alike by `anchor plan` and by training."""

from __future__ import annotations

from dataclasses import dataclass

from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import CPU_TOKENS, EFFICIENT_TOKENS, LayerOptions, largest_budget
from anchor_cli.plan.zero import StateOptions
from anchor_cli.spec.spec import RunSpec


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, whether layers are recomputed, and the reason of each, as it is printed."""

    tokens: int
    source: str
    checkpointing: bool
    checkpointing_source: str


def expected_kernel(spec: RunSpec) -> str:
    """`flash` or `sdpa`: what a GPU will run, as far as the spec decides it; there is no flash kernel in fp32."""
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
    loss_bytes: float = 0.0,
) -> Budget:
    """The spec's values; where it leaves the choice, what fits into `device_bytes` (None: a CPU).

    Checkpointing costs one more forward pass, so `auto` takes it only if, without it, the budget (or, when that is open
    too, `EFFICIENT_TOKENS` and the longest row) does not fit. A chosen budget is never below the longest row.
    `kernel`: the one that will run, where that is known; else what the spec lets expect (fp32 has no flash kernel).
    """
    mode, given = spec.gradient_checkpointing, spec.max_tokens_per_micro_batch
    checkpointing, why = mode is True, "the spec"
    if device_bytes is None or shape is None:
        tokens, source = (given, "the spec") if given else (max(longest_row, CPU_TOKENS), "the CPU's default")
        return Budget(tokens, source, checkpointing, why if mode != "auto" else "auto: off on a CPU")
    if kernel is None:
        kernel = expected_kernel(spec)
    first = spec.stage == "I"
    fitting = {
        recompute: largest_budget(
            shape, options, LayerOptions(recompute, kernel, liger, first, loss_bytes), device_bytes
        )
        for recompute in (False, True)
    }
    if mode == "auto":
        checkpointing = fitting[False] < max(longest_row, given or EFFICIENT_TOKENS)
        why = "auto: memory needs it" if checkpointing else "auto: fits without"
    if given:
        return Budget(given, "the spec", checkpointing, why)
    return Budget(max(longest_row, fitting[checkpointing]), "what fits in memory", checkpointing, why)
