"""Which kernels inductor makes of a decoder layer for an H100, and what they read and write, without a card.

A layer is traced by dynamo and split into forward and backward as in training (`compile_layers`); each graph is then
moved to fake CUDA tensors and given to inductor's own lowering and scheduler, which decide what is fused. Its count of
the buffers that a fused kernel reads and writes is taken. Nothing is computed: a graph answers with tensors of the
right shapes whose memory is never touched.

What this leans on is private to PyTorch (tried with 2.13 and triton 3.7.1): the properties of a card that is not there
are patched in, for this process only.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

H100 = {"multi_processor_count": 132, "major": 9, "minor": 0, "regs_per_multiprocessor": 65536, "warp_size": 32,
        "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "total_memory": 80 << 30,
        "shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20, "name": "NVIDIA H100",
        "gcnArchName": ""}  # fmt: skip
Kernel = tuple[str, bool, int]
"""Name, whether it is a matrix product of a library, bytes."""


@cache
def pretend_h100() -> None:
    """Let inductor ask a card that does not exist. A CPU build has no device guard for CUDA: the one of `meta` does."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import hints

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    if not guards[cuda]:
        guards[cuda] = guards[meta]
    properties = SimpleNamespace(**H100)
    made = hints.DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    hints.DeviceProperties.create = staticmethod(lambda device: made)  # type: ignore[method-assign,assignment]
    for place in (CudaInterface, CudaInterface.Worker):
        place.get_device_properties = staticmethod(lambda device=None: properties)  # type: ignore[assignment]
        place.current_device = staticmethod(lambda: 0)  # type: ignore[assignment]
    CudaInterface.is_available = staticmethod(lambda: True)  # type: ignore[assignment]
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0


def kernels_of(graph_module: Any, inputs: Any, is_backward: bool) -> list[Kernel]:
    """The kernels that inductor's scheduler makes of one graph, on CUDA."""
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    fake = detect_fake_mode(inputs)

    def on_cuda(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with fake:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")

    moved = copy.deepcopy(graph_module)
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    values = [on_cuda(value) for value in inputs]
    with V.set_debug_handler(DebugContext()), V.set_fake_mode(fake), torch.no_grad():
        FakeTensorProp(moved, mode=fake).propagate_dont_convert_inputs(*values)
        compile_fx._recursive_post_grad_passes(moved, False)
        compile_fx.record_original_output_strides(moved)
        graph = GraphLowering(moved, shape_env=fake.shape_env, is_backward=is_backward, is_inference=False)
        with V.set_graph_handler(graph), V.set_real_inputs(values):
            graph.run(*values)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return [
                (name, name.startswith("extern_kernels"), int(node.get_read_write_buffers_sizes()))
                for node in graph.scheduler.nodes
                for name in (str(getattr(node.node, "python_kernel_name", None) or node.get_name()),)
            ]


def untouched(value: Any) -> Any:
    """A tensor like a graph's output, uninitialised; sizes and None as they are."""
    if not isinstance(value, torch.Tensor):
        return value if value is None else int(value)
    return torch.empty_strided(tuple(map(int, value.shape)), tuple(map(int, value.stride())), dtype=value.dtype)


def mixed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stands for the attention kernel: shapes and gradients of the right layout, next to no work."""
    groups = query.shape[1] // key.shape[1]
    return query + (key + value).repeat_interleave(groups, dim=1)


def compiled_kernels(shape: dict[str, Any], tokens: int, texts: int = 0) -> dict[str, list[Kernel]]:
    """The kernels of one `layer` and of the final `norm`, forward and backward of one pass over `tokens` tokens.

    `texts`: of the last layer where it is pruned, as `anchor train` does on CUDA, to the end of so many texts.
    """
    import torch._functorch.config
    import torch._inductor.config
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx
    from transformers import AutoModelForCausalLM, Qwen3Config

    from anchor_cli.model.attention import KERNELS, PACKED_ATTENTION, register
    from anchor_cli.model.backbone import compile_layers
    from anchor_cli.model.packed import pack_texts
    from anchor_cli.model.pooling import prune_last_layer
    from anchor_cli.model.reconstruction import ReconstructionModel
    from anchor_cli.model.rotary_kernel import fuse_queries_and_keys

    pretend_h100()
    register()
    KERNELS["mixed"] = mixed
    torch._dynamo.reset()
    made: dict[str, list[Kernel]] = {"layer": [], "norm": []}

    def backend(part: str) -> Any:
        def count(graph_module: Any, inputs: Any, **kwargs: Any) -> Any:
            made[part].extend(kernels_of(graph_module, inputs, bool(kwargs.get("is_backward"))))
            outputs = next(n for n in graph_module.graph.nodes if n.op == "output").args[0]
            return make_boxed_func(lambda *_: [untouched(getattr(n, "meta", {}).get("val")) for n in outputs])

        return lambda graph_module, inputs: compile_fx(graph_module, inputs, inner_compile=count)

    sizes = shape | {"num_hidden_layers": 1, "vocab_size": 1000, "bos_token_id": None, "eos_token_id": None}
    config = Qwen3Config(**sizes, attn_implementation=PACKED_ATTENTION, use_cache=False)
    model = ReconstructionModel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train(), kernel="mixed")
    packed = pack_texts(np.array_split(np.full(tokens, 3, dtype=np.int32), texts or 1))
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
    ):
        fuse_queries_and_keys(model.language_model)
        if texts:
            prune_last_layer(model.language_model)
        compile_layers(model.language_model, backend=backend("layer"))
        model.language_model.get_decoder().norm.compile(backend=backend("norm"))
        embed = model.language_model.get_input_embeddings()
        out = model.encode(packed) if texts else model.hidden_states(embed(packed.input_ids), packed)
        out.float().sum().backward()
    torch._dynamo.reset()
    return made


def compiled_traffic(shape: dict[str, Any], tokens: int, texts: int = 0) -> dict[str, tuple[float, int]]:
    """Part -> (bytes, launches) of everything but matrix products, one pass over `tokens` tokens."""
    made = {}
    for part, kernels in compiled_kernels(shape, tokens, texts).items():
        others = [moved for _, is_product, moved in kernels if not is_product and moved]  # 0: a view of an output
        made[part] = float(sum(others)), len(others)
    return made


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from step_traffic import QWEN3_0_6B

    texts = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for part, kernels in compiled_kernels(QWEN3_0_6B, 16384, texts).items():
        print(part)
        for name, is_product, moved in kernels:
            print(f"  {name:28s} {'product' if is_product else '':8s} {moved / (16384 * 1024 * 2):6.2f} x (T, h)")
        print(sum(moved for _, is_product, moved in kernels if not is_product) / (16384 * 2048))
