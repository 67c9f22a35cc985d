"""`anchor doctor`: is this host fit to train. One line a check: ok, warn or fail, and what to do about it.

`warn` is what makes a run slow, fragile or small; `fail` is what makes it stop or be wrong. Checks are independent: one
that raises becomes a `fail` line of its own and the others still run. Useful without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from anchor_cli.base.check import Check
from anchor_cli.doctor.needs import Needs

HostCheck = Callable[[Needs], Iterator[Check]]


def check_host(needs: Needs, *, gradients: bool = False) -> Iterator[Check]:
    """Run every check and yield its line as soon as it is known (software, GPUs, host; the slow ones last).

    Args:
        needs: where the run will write and which kernel it asks for.
        gradients: also compare DeepSpeed's accumulated gradients with plain autograd on this host (some 30 s).
    """
    from anchor_cli.doctor import gpu as doctor_gpu
    from anchor_cli.doctor import host as doctor_host
    from anchor_cli.doctor import parallel as doctor_parallel
    from anchor_cli.doctor import software as doctor_software

    checks: list[tuple[str, HostCheck]] = [
        ("python", doctor_software.python),
        ("packages", doctor_software.packages),
        ("deepspeed", doctor_software.deepspeed),
        ("compiler", doctor_software.compiler),
        ("compiler locks", doctor_software.compiler_locks),
        ("GPUs", doctor_gpu.gpus),
        ("GPU links", doctor_gpu.links),
        ("attention kernel", doctor_gpu.attention_kernel),
        ("Liger", doctor_gpu.liger),
        ("memory", doctor_host.memory),
        ("shared memory", doctor_host.shared_memory),
        ("file descriptors", doctor_host.file_descriptors),
        ("disk", doctor_host.disk),
        ("Hub", doctor_host.hub),
        ("clock", doctor_host.clock),
        ("W&B", doctor_host.wandb),
        ("all-reduce", doctor_parallel.all_reduce),
    ]
    if gradients:
        checks.append(("gradients", doctor_parallel.gradients))
    for name, check in checks:
        yield from _guarded(name, check, needs)


def _guarded(name: str, check: HostCheck, needs: Needs) -> Iterator[Check]:
    try:
        yield from check(needs)
    except Exception as error:  # a broken host breaks checks in ways nobody listed
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Check(name, "fail", f"the check itself failed: {reason}", "see docs/troubleshooting.md, or report it")


def summary(checks: list[Check]) -> dict[str, Any]:
    """The document of `--json`: the verdict, the counts and every line."""
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    verdict = "fail" if counts["fail"] else "warn" if counts["warn"] else "ok"
    return {"verdict": verdict, "counts": counts, "checks": [asdict(check) for check in checks]}
