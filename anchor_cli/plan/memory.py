"""Device memory of one rank in training, by part, from the model's shape alone. Pure arithmetic, in bytes.

Legend: T tokens of a micro-batch (queries + documents), h hidden size, H/K query/key-value heads, d head size, f MLP
width, V vocabulary rows, b bytes of the compute type (bfloat16 2, float32 4). States and buffers of ZeRO: plan/zero.py.

Activations: what PyTorch's autograd saves in transformers' Qwen3 layer, counted tensor by tensor and checked against
`torch.autograd.graph.saved_tensors_hooks` (tests/test_memory_model.py). Both passes' graphs are alive at once, because
the gradient of the reconstruction flows through the embedding: 2 T tokens.
Everything marked *assumption* below has not been measured on a GPU (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.zero import StateOptions, state_bytes

LOGIT_CHUNK_BYTES = 1024 * 2**20  # fp32 logits of a chunk, plain form on CUDA: model/output_layer.py CHUNK_BYTES_CUDA
FUSED_CHUNK = 4096  # targets of a chunk, fused form: model/output_layer.py FUSED_CHUNK
USABLE_SHARE = 0.90  # assumption: of a card's memory, after allocator slack
CONTEXT_BYTES = 1.5e9  # assumption: CUDA context, NCCL buffers, cuBLAS workspaces
TOKENS_STEP = 1024  # budgets are multiples of this
EFFICIENT_TOKENS = 8192  # assumption: below this many tokens the matrix units are not full; checkpointing pays
LARGEST_BUDGET = 65536  # assumption: nothing is gained beyond
CPU_TOKENS = 8192  # budget of a CPU process

Fused = Literal["compiled", "liger", "none"]


@dataclass(frozen=True)
class LayerOptions:
    """What decides the memory of activations.

    `kernel`: `flash` (grouped heads), `repeated` (a flash kernel that takes keys and values of all heads) or `sdpa`
    (one call a text). Liger's norms of queries and keys are not counted on: it fuses them in an existing Qwen3 from
    0.8.5 on only (https://github.com/linkedin/Liger-Kernel/pull/1470).
    `selective`: compiled layers make the MLP's normed input and the product of its halves again (model/backbone.py).
    """

    checkpointing: bool = False
    kernel: str = "flash"
    fused: Fused = "none"
    selective: bool = False
    reconstructs: bool = True
    """Stage I: two passes are kept, and the output layer is computed. Stage II: one pass, and `loss_bytes` instead."""
    loss_bytes: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by part; `total` is their sum."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    working: float
    output_layer: float
    context: float

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


def layer_bytes_per_token(shape: ModelShape, b: int, layers: LayerOptions) -> float:
    """Bytes autograd keeps of one layer whose forward pass is not recomputed, per token."""
    h, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    plain, made_again = layers.fused == "none", b if layers.selective else 0
    # two norms: eager keeps the fp32 input, the normed and the output, fused ones the input and the output
    norms = 2 * ((4 + 2 * b if plain else 2 * b) * h + 4) - made_again * h
    qk_inputs = (b if layers.fused == "compiled" else 4 + b) * (q + kv)
    qk_norms = (qk_inputs + 4 * (shape.num_heads + shape.num_kv_heads)) if shape.qk_norm else 0
    attention = b * (q + 2 * kv + q)  # rotated q and k, v, output
    if layers.kernel == "repeated":
        attention = b * 4 * q  # k and v repeated to all heads
    elif layers.kernel == "sdpa":
        attention = b * 5 * q  # the same; the texts' outputs and their concatenation
    mlp = (4 if plain else 3) * b * f - made_again * f  # gate, up, product; eager also keeps silu(gate)
    return norms + qk_norms + attention + 4 * shape.num_heads + mlp


def activation_bytes_per_token(shape: ModelShape, b: int, layers: LayerOptions) -> float:
    """Bytes kept by one pass over the model, per token; checkpointing keeps each layer's input only."""
    layer = b * shape.hidden_size if layers.checkpointing else layer_bytes_per_token(shape, b, layers)
    final_norm = (b if layers.fused == "compiled" else 4 + b) * shape.hidden_size + 4
    rotary = 2 * b * shape.head_dim
    return shape.num_layers * layer + final_norm + rotary + 8


def working_bytes_per_token(shape: ModelShape, b: int, layers: LayerOptions) -> float:
    """Bytes a backward step holds besides: gradients inside one layer, and that layer again when it is recomputed."""
    # the MLP's, counted (tests/test_memory_model.py); one more of each where they are made again
    gradients = (3 if layers.selective else 2) * b * (shape.intermediate_size + shape.hidden_size)
    return gradients + (layer_bytes_per_token(shape, b, layers) if layers.checkpointing else 0)


def output_layer_bytes(
    shape: ModelShape, b: int, tokens: int, chunk_bytes: int = LOGIT_CHUNK_BYTES, fused: bool | None = None
) -> float:
    """Logits of one chunk, the fp32 gradient of the output matrix, and that gradient's product or copy in b.

    Plain form: logits in fp32 and, while they are made and while they are used, in b. Fused form: one buffer in b.
    `fused` None: the form of model/output_layer.py that needs more. A micro-batch has about as many targets as tokens.
    """
    in_b = 0 if b == 4 else b
    plain = min(chunk_bytes / 4, tokens * shape.vocab_size) * (4 + in_b)
    in_place = min(FUSED_CHUNK, tokens) * shape.vocab_size * b
    chunk = max(plain, in_place) if fused is None else in_place if fused else plain
    return chunk + shape.embedding_parameters * (4 + in_b)


def training_memory(
    shape: ModelShape,
    states: StateOptions,
    layers: LayerOptions,
    tokens: int,
    *,
    chunk_bytes: int = LOGIT_CHUNK_BYTES,
    fused: bool | None = None,
    context: float = CONTEXT_BYTES,
) -> Memory:
    """Peak memory of one rank for micro-batches of `tokens` tokens.

    The gradient of the (tied) embedding counts once in the working memory: the parts of it that the look-ups produce
    are dense (V, h) tensors. Output layer and backward do not peak together: the larger of the two counts.
    """
    b = states.bytes_per_value
    weights, gradients, optimizer, buckets = state_bytes(shape, states)
    kept = activation_bytes_per_token(shape, b, layers)
    work = tokens * working_bytes_per_token(shape, b, layers)
    work += 2 * b * shape.embedding_parameters  # its gradient so far and the next look-up's
    logits = output_layer_bytes(shape, b, tokens, chunk_bytes, fused) if layers.reconstructs else layers.loss_bytes
    kept *= (2 if layers.reconstructs else 1) * tokens
    return Memory(weights, gradients, optimizer, buckets, kept, max(0.0, work - logits), logits, context)


def largest_budget(shape: ModelShape, states: StateOptions, layers: LayerOptions, device_bytes: float) -> int:
    """The largest budget, a multiple of 1,024 up to 65,536 tokens, whose peak fits in the usable memory; 0 if none."""

    def needs(tokens: int) -> float:
        return training_memory(shape, states, layers, tokens).total

    fits = [t for t in range(TOKENS_STEP, LARGEST_BUDGET + 1, TOKENS_STEP) if needs(t) <= USABLE_SHARE * device_bytes]
    return max(fits, default=0)
