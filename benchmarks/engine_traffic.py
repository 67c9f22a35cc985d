"""What DeepSpeed adds to a step: synchronisations of the device, launches and bytes, counted on its real engine.

Two ranks, of which only this one exists (torch's fake process group), on a CPU, 28 layers of Qwen3 64 wide: the number
of launches follows the number of parameter tensors, bytes are linear in parameters. DeepSpeed's CPU accelerator answers
as its CUDA one does where it asks about streams (`resolves_data_dependency`), so that the code of CUDA runs.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel

FUSED_CHUNK_VALUES = 65536 * 320
"""Values that one launch of torch's multi-tensor kernels handles (MultiTensorApply.cuh: chunk size times blocks)."""


class Launches(TorchDispatchMode):
    """Operators that run a kernel, bytes they move, reads of a device value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes, self.reads = 0, 0, 0
        self.names: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from step_traffic import FREE, is_view, operator_bytes

        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = f"{function.namespace}.{function._schema.name.split('::')[1]}"
        if name == "aten._local_scalar_dense":
            self.reads += 1
        elif name not in FREE and not is_view(function) and not name.startswith("c10d"):
            moved = operator_bytes(name, function, args, kwargs, out)
            self.launches += 1 if moved else 0
            self.bytes += moved
            self.names[name] += 1
        return out


class Stream:
    """CUDA's interface, on a host where everything has happened already."""

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


def small_engine(config: str, world_size: int) -> tuple[Any, Any, ReconstructionModel]:
    """(engine, micro-batch, model), two micro-batches a step."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM, Qwen3Config

    from anchor_cli.model.attention import PACKED_ATTENTION, register
    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.deepspeed import build_engine, quiet_deepspeed

    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511"
    )
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    with quiet_deepspeed() as deepspeed:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    register()
    shape = Qwen3Config(
        hidden_size=64, intermediate_size=192, num_hidden_layers=28, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=2000, tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None,
        attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    model = ReconstructionModel(AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).train(), kernel="sdpa")
    spec = RunSpec.model_validate({"model_name_or_path": "m", "dataset_file_path": "d", "deepspeed": config})
    resolved = resolve_ds_config(
        load_ds_config(config, "."), spec, gradient_accumulation_steps=2, micro_batch_size=1, world_size=world_size
    )
    engine, _ = build_engine(model, spec, resolved, torch.device("cuda"))  # decides only that AdamW is fused
    chance = np.random.default_rng(0)
    texts = [chance.integers(3, 1999, 12).astype(np.int32) for _ in range(4)]
    starts = np.zeros(2, np.int32)
    return engine, pack_pairs(texts[:2], texts[2:], starts, starts, eos_token_id=2, targets="text"), model


def engine_traffic(config: str = "zero2_bf16", world_size: int = 2) -> dict[str, float]:
    """Counts of one config. Call it once a process."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the import, which would say on stdout what it found
    from deepspeed.accelerator import get_accelerator

    synchronised = [0]

    def synchronize(*_: Any) -> None:
        synchronised[0] += 1

    stream = Stream()
    stream.synchronize = synchronize  # type: ignore[method-assign,assignment]
    kind = type(get_accelerator())
    kind.synchronize, kind.resolves_data_dependency = staticmethod(synchronize), staticmethod(lambda: False)
    kind.is_synchronized_device = staticmethod(lambda: False)
    kind.Stream = property(lambda _: lambda *args: stream)
    kind.current_stream = kind.default_stream = lambda *_: stream
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign,assignment]
    kind.stream = lambda *_: contextlib.nullcontext()
    engine, batch, model = small_engine(config, world_size)
    parameters = sum(p.numel() for p in model.parameters())

    with Launches() as plain:  # the same backward pass without the engine
        loss = model(batch, 0.01, 0.01).loss
        forward_launches = plain.launches
        plain.launches = plain.bytes = 0
        torch.autograd.grad(loss, list(model.parameters()))

    counts: list[dict[str, Launches | int]] = []
    for _ in range(4):  # the throughput timer begins after two steps
        for _ in range(2):
            before = synchronised[0]
            loss = engine(batch, 0.01, 0.01).loss
            with Launches() as backward:
                engine.backward(loss)
            with Launches() as update:
                engine.step()
            counts.append({"synchronised": synchronised[0] - before, "backward": backward, "update": update})
    first, last = counts[-2], counts[-1]
    within: Any = first["backward"]
    boundary: Any = last["update"]
    # On CUDA the fused AdamW of one flat tensor is a launch a chunk; here of this rank's share of Qwen3-0.6B.
    adam = -(-(596_000_000 // world_size) // FUSED_CHUNK_VALUES)
    return {
        "device_syncs_per_micro_batch": float(first["synchronised"] + within.reads),  # type: ignore[operator]
        "device_syncs_at_the_boundary": float(last["synchronised"] - first["synchronised"] + boundary.reads),  # type: ignore[operator]
        "boundary_launches": boundary.launches - 1 + adam,
        "reduction_launches_per_micro_batch": within.launches - plain.launches,
        "reduction_bytes_per_parameter": (within.bytes - plain.bytes) / parameters,
        "boundary_bytes_per_parameter": boundary.bytes / parameters,
        "forward_launches_of_the_small_model": forward_launches,
    }


if __name__ == "__main__":
    import json
    import sys
    from pathlib import Path

    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    print(json.dumps(engine_traffic(*sys.argv[1:2]), indent=1))
