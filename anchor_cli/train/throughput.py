"""How fast a run is: pairs, tokens and useful FLOPs since the last record, and memory at its peak."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from anchor_cli.base import metric_names as names
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.hardware import gpu_of_device_name
from anchor_cli.train.run import Run


class Throughput:
    """Counts whole steps of all ranks in a window of time; evaluation and saving begin a new one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._shape = ModelShape.from_config(run.model.language_model.config.to_dict())
        cuda = run.ranks.device.type == "cuda"
        gpu = gpu_of_device_name(torch.cuda.get_device_name(run.ranks.device)) if cuda else None
        self._peak_flops = gpu.bf16_tflops * 1e12 * run.ranks.world_size if gpu else None
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._start, self._pairs, self._tokens, self._flops = time.monotonic(), 0, 0, 0

    def add(self, step: Any) -> None:
        """Count a step."""
        self._pairs += len(step.rows)
        self._tokens += step.tokens
        if self._peak_flops:
            self._flops += self._run.objective.flops(self._shape, step)

    def record(self) -> dict[str, float]:
        """The window under the names of metrics.jsonl; MFU where the card's peak is known. Begins a new one."""
        seconds = max(1e-9, time.monotonic() - self._start)
        record = {
            names.PAIRS_PER_S: self._pairs / seconds,
            names.TOKENS_PER_S: self._tokens / seconds,
            names.PEAK_MEMORY_GB: peak_memory_gb(self._run.ranks.device),
        }
        if self._run.ranks.device.type == "cuda":
            record[names.RESERVED_MEMORY_GB] = torch.cuda.max_memory_reserved(self._run.ranks.device) / 1e9
        if self._peak_flops:
            record[names.MFU] = self._flops / (seconds * self._peak_flops)
        self.restart()
        return record


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): of the GPU, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
