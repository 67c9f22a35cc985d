"""Steps and learning rate of a run: pure arithmetic.

A *step* is one optimizer update. Steps are counted from 0: "step s" is the update that turns the weights after s
updates into the weights after s + 1 updates, and a checkpoint named `checkpoint-N` holds the weights after N updates.
"""

from __future__ import annotations

import math


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Full global batches in an epoch; a last incomplete batch is dropped. 1,862,922 rows at 128 are 14,554."""
    return num_rows // global_batch_size


def total_steps(num_rows: int, global_batch_size: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Steps of the full schedule. `max_steps` > 0 overrides the epochs, as in Hugging Face `TrainingArguments`.

    A fractional number of epochs is rounded up to a whole step, as Hugging Face does.
    """
    if max_steps > 0:
        return max_steps
    return math.ceil(steps_per_epoch(num_rows, global_batch_size) * num_train_epochs)


def warmup_steps_of(total: int, warmup_steps: int, warmup_ratio: float | None) -> int:
    """Warm-up length in steps: a ratio, where given, is a share of all steps, rounded up (Hugging Face's rule)."""
    return math.ceil(total * warmup_ratio) if warmup_ratio is not None else warmup_steps


def learning_rate(step: int, *, peak: float, warmup: int, total: int, kind: str = "linear") -> float:
    """Learning rate of the update that starts from `step` updates.

    `linear`: step/warmup up to `peak`, then linear to 0 at `total`. `constant` and `constant_with_warmup`: as named;
    `cosine`: half a cosine to 0. Equal to `transformers.get_scheduler` (tests/test_schedule.py), including
    its convention that the very first update of a warm-up has learning rate 0.
    """
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * (step / max(1, warmup))
    if kind == "constant_with_warmup":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return peak * max(0.0, (total - step) / max(1, total - warmup))


def interval_steps(value: float, total: int) -> int:
    """`eval_steps` / `save_steps` in steps: below 1 a share of all steps (rounded up), 0 switches off (returns 0)."""
    if value <= 0:
        return 0
    return max(1, math.ceil(value * total - 1e-9)) if value < 1 else int(value)  # 0.07 x 100 is 7, not 8
