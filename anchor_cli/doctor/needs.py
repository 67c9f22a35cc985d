"""What the run to come needs of this host, from a spec or the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wishes:
    """What the run to come needs, from a spec or the defaults."""

    output_dir: Path = Path("output")
    attn_implementation: str = "auto"
    model: str | None = None
    report_to: tuple[str, ...] = ()
    deepspeed: str | None = None


def wishes_of(spec: Any) -> Wishes:
    """What a `RunSpec` needs of the host."""
    report_to = spec.report_to if isinstance(spec.report_to, list | tuple) else [spec.report_to]
    return Wishes(
        output_dir=Path(spec.output_dir).expanduser(),
        attn_implementation=spec.attn_implementation,
        model=str(spec.model_name_or_path),
        report_to=tuple(report_to),
        deepspeed=spec.deepspeed,
    )
