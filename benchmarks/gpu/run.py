"""Run the prepared measurements of one card, or of two, part by part: each in its own process, with its own time-out.

    python benchmarks/gpu/run.py one-card --call 1        # under 8 minutes
    python benchmarks/gpu/run.py one-card --call 2        # under 5 minutes
    python benchmarks/gpu/run.py two-cards                # 5 minutes
    python benchmarks/gpu/run.py one-card --call all --dry    # whole, on a CPU, tiny sizes: proves that it runs

Every part prints one JSON line as soon as it ends, failed or not, and appends it to --out ($OUT/gpu.jsonl with OUT): a
later part's failure, or the end of the machine's time, loses nothing. What the parts measure: parts.py, cards.py.
`make gpu-kit` prepares what a host without network needs (kit.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CALLS = {  # part -> seconds that it may take on a card
    "one-card": {
        "1": {"host": 60, "ceiling": 40, "attention": 60, "output": 60, "stock": 60, "liger": 60, "compile": 120},
        "2": {"large": 120, "train": 240, "padded": 60, "curve": 120, "encode": 60},
    },
    "two-cards": {"all": {"zero2": 70, "overlap": 70, "zero1": 70, "killed": 60, "resume": 60}},
}
LIMIT_S = {("one-card", "1"): 470, ("one-card", "2"): 290, ("two-cards", "all"): 300}
"""Seconds of a whole call; a part that would begin later is skipped, and says so."""


def run_part(part: str, seconds: float, dry: bool, kit: Path, scratch: Path) -> dict[str, Any]:
    """One part in a process of its own; its result, or why there is none."""
    command = [sys.executable, str(HERE / "parts.py"), part, "--kit", str(kit), "--scratch", str(scratch)]
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, *(["--dry"] if dry else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, **({"TRITON_INTERPRET": "1"} if dry else {})},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
        failure = None if process.returncode == 0 else (err.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the part's own children, too
        out, err = process.communicate()
        failure = f"not done after {seconds:.0f} s"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    line: dict[str, Any] = {"part": part, "seconds": round(time.monotonic() - began, 1)}
    if lines:
        line["result"] = json.loads(lines[-1])
    if failure:
        line |= {"failed": failure[:500], "stderr": err.strip().splitlines()[-15:]}
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", choices=tuple(CALLS))
    parser.add_argument("--call", choices=("1", "2", "all"), default="all")
    parser.add_argument("--only", action="append", help="these parts alone")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--kit", type=Path, default=HERE.parents[1] / "gpu-kit", help="the folder of make gpu-kit")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.jsonl")
    args = parser.parse_args()
    calls = CALLS[args.cards]
    chosen = list(calls) if args.call == "all" or args.cards == "two-cards" else [args.call]
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        for call in chosen:
            end = time.monotonic() + (1e9 if args.dry else LIMIT_S[args.cards, call])
            for part, seconds in calls[call].items():
                if args.only and part not in args.only:
                    continue
                left = end - time.monotonic()
                if left < 10:
                    line: dict[str, Any] = {"part": part, "failed": "skipped: the call's time is spent"}
                else:
                    limit = 900 if args.dry else min(seconds, left)
                    line = run_part(part, limit, args.dry, args.kit, Path(scratch))
                failures += "failed" in line
                print(json.dumps(line), flush=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return 1 if failures and args.dry else 0


if __name__ == "__main__":
    sys.exit(main())
