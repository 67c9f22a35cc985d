"""Token budget and gradient checkpointing of a run: one decision, made alike by `anchor plan` and by training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import CPU_TOKENS, EFFICIENT_TOKENS, Fused, LayerOptions, largest_budget
from anchor_cli.plan.zero import StateOptions
from anchor_cli.spec.spec import RunSpec

_SELECTIVE = "auto: the MLP's norm and product only"


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, whether layers are recomputed, and the reason of each, as it is printed."""

    tokens: int
    source: str
    checkpointing: bool
    checkpointing_source: str
    selective: bool = False
    """Compiled layers recompute the MLP's normed input and its product (`LayerOptions`)."""
    alternative: Budget | None = None
    """A larger one by recomputing these: for a plan that has fewer micro-batches with it (`fewest_micro_batches`)."""


def expected_kernel(spec: RunSpec) -> str:
    """`flash` or `sdpa`: what a GPU will run, as far as the spec decides it; there is no flash kernel in fp32."""
    return "sdpa" if spec.attn_implementation == "sdpa" or spec.precision == "float32" else "flash"


def expected_fused(spec: RunSpec, options: StateOptions, liger_fits: bool) -> Fused:
    """How a GPU's layers will be fused, as far as the spec decides it (model/fusing.py): Triton is taken to work."""
    if spec.torch_compile is True or (
        spec.torch_compile == "auto" and spec.liger is not True and options.zero_stage != 3
    ):
        return "compiled"
    return "liger" if liger_fits and spec.liger is not False else "none"


def fewest_micro_batches(budget: Budget, count: Callable[[int], int]) -> Budget:
    """The budget, or its alternative where that saves a micro-batch a step; `count` of a budget's tokens.

    What is made again costs some 1% of a step (counted: docs/performance.md), a micro-batch its launches and, under
    ZeRO-2, one more reduction of all gradients.
    """
    other = budget.alternative
    return other if other is not None and count(other.tokens) < count(budget.tokens) else budget


def choose_budget(
    spec: RunSpec,
    shape: ModelShape | None,
    options: StateOptions,
    device_bytes: float | None,
    longest_row: int,
    *,
    kernel: str | None = None,
    fused: Fused = "none",
    loss_bytes: float = 0.0,
) -> Budget:
    """The spec's values; where it leaves the choice, what fits into `device_bytes` (None: a CPU).

    Checkpointing costs one more forward pass, so `auto` takes it only if, without it, the budget (or, when that is open
    too, `EFFICIENT_TOKENS` and the longest row) does not fit; compiled layers recompute cheap parts before that.
    A chosen budget is never below the longest row.
    `kernel`: the one that will run, where that is known; else what the spec lets expect (fp32 has no flash kernel).
    """
    mode, given = spec.gradient_checkpointing, spec.max_tokens_per_micro_batch
    checkpointing, why = mode is True, "the spec"
    if device_bytes is None or shape is None:
        tokens, source = (given, "the spec") if given else (max(longest_row, CPU_TOKENS), "the CPU's default")
        return Budget(tokens, source, checkpointing, why if mode != "auto" else "auto: off on a CPU")
    if kernel is None:
        kernel = expected_kernel(spec)
    layers = LayerOptions(False, kernel, fused, reconstructs=spec.stage == "I", loss_bytes=loss_bytes)
    fitting = {
        (recompute, selective): largest_budget(
            shape, options, replace(layers, checkpointing=recompute, selective=selective), device_bytes
        )
        for recompute, selective in ((False, False), (False, fused == "compiled"), (True, False))
    }
    selective = False
    if mode == "auto":
        needed = max(longest_row, given or EFFICIENT_TOKENS)
        enough = [choice for choice, tokens in fitting.items() if tokens >= needed]
        checkpointing, selective = enough[0] if enough else (True, False)
        why = "auto: memory needs it" if checkpointing else _SELECTIVE if selective else "auto: fits without"
    if given:
        return Budget(given, "the spec", checkpointing, why, selective)
    made = Budget(
        max(longest_row, fitting[checkpointing, selective]), "what fits in memory", checkpointing, why, selective
    )
    if mode != "auto" or fused != "compiled" or checkpointing or selective:
        return made
    larger = max(longest_row, fitting[False, True])
    return replace(made, alternative=replace(made, tokens=larger, checkpointing_source=_SELECTIVE, selective=True))
