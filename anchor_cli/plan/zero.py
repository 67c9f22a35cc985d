"""What ZeRO keeps on one rank and sends between ranks: pure arithmetic, in bytes.

Legend: P parameters, N ranks, g = 2 (or 4: fp32 accumulation), b bytes of the compute type (bfloat16 2, float32 4).
ZeRO is arXiv 1910.02054, section 3; the code is DeepSpeed 0.19's `stage_1_and_2.py`.

    weights b P (all ranks; stage 3: / N) · gradients g P / N from stage 2, g P below
    Adam 8 P / N and, for bfloat16, an fp32 copy of the weights 4 P / N
    reduction, on one GPU too: a bucket, two where reducing overlaps the backward pass, of the gradients' type (stage 1:
    of the accumulator's); while one is reduced, a flat copy of it, and another in the type that is communicated. A
    gradient larger than the bucket, as of a large embedding table, is reduced by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anchor_cli.plan.flops import ModelShape
from anchor_cli.spec.spec import RunSpec

_DEFAULT_BUCKET = 500_000_000  # DeepSpeed 0.19's reduce_bucket_size


@dataclass(frozen=True)
class StateOptions:
    """What decides the memory of weights, gradients and optimizer. `bucket` is DeepSpeed's `reduce_bucket_size`."""

    bytes_per_value: int = 2
    gradient_bytes: int = 2
    communication_bytes: int = 2
    zero_stage: int = 2
    world_size: int = 1
    bucket: int = 500_000_000
    offload_optimizer: bool = False
    overlap: bool = False


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
        overlap=bool(zero.get("overlap_comm", zero.get("stage") == 3)),  # DeepSpeed's default
    )


def state_bytes(shape: ModelShape, options: StateOptions) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer and reduction buckets on one rank."""
    parameters, share = shape.num_parameters, shape.num_parameters / options.world_size
    weights = options.bytes_per_value * (share if options.zero_stage >= 3 else parameters)
    gradients = options.gradient_bytes * (share if options.zero_stage >= 2 else parameters)
    optimizer = (8 if options.bytes_per_value == 4 else 12) * (share if options.zero_stage >= 1 else parameters)
    kept_as = options.gradient_bytes if options.zero_stage == 1 else options.bytes_per_value
    buffers = options.bucket * kept_as * (2 if options.overlap else 1)
    largest = max(min(options.bucket, parameters), shape.embedding_parameters)
    buffers += largest * (kept_as + (options.communication_bytes if options.communication_bytes != kept_as else 0))
    return weights, gradients, 0 if options.offload_optimizer else optimizer, buffers


def communication_bytes(shape: ModelShape, options: StateOptions, micro_batches: int) -> float:
    """Bytes one rank sends in a step (ring algorithms; docs/performance.md).

    ZeRO-2 reduces all gradients in *every* micro-batch, stages 0 and 1 once a step. DeepSpeed 0.19 does so by an
    all-reduce of each bucket (`use_multi_rank_bucket_allreduce`, its default): 2 (N - 1) / N of the gradients leave a
    rank, twice a reduce-scatter, which stage 3 uses. After the update each rank sends its shard of the new weights on.
    Stage 3 gathers the weights for both passes, forward and backward, besides.
    """
    n, parameters = options.world_size, shape.num_parameters
    share = (n - 1) / n
    reductions = micro_batches if options.zero_stage >= 2 else 1
    factor = 1 if options.zero_stage == 3 else 2
    sent = reductions * factor * options.communication_bytes * parameters * share
    if options.zero_stage >= 1:
        gathers = 1 if options.zero_stage <= 2 else 4 * micro_batches  # two passes, forward and backward
        sent += gathers * options.bytes_per_value * parameters * share
    return sent
