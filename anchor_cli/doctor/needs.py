"""What the run to come needs of this host, from a spec or the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anchor_cli.spec.spec import RunSpec


@dataclass(frozen=True)
class Needs:
    """The parts of a spec that a host can fail."""

    output_dir: Path = Path("output")
    attn_implementation: str = "auto"
    report_to: tuple[str, ...] = ()
    deepspeed: str | None = None
    precision: str | None = None

    @classmethod
    def of(cls, spec: RunSpec) -> Needs:
        return cls(
            Path(spec.output_dir).expanduser(), spec.attn_implementation, spec.reporters, spec.deepspeed, spec.precision
        )
