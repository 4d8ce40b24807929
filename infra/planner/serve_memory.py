"""Memory of one GPU of a replica: weights, KV cache, activations; blocks and the concurrency that they hold."""

from dataclasses import dataclass

from infra.planner.estimate import GIB, Estimate, total
from infra.planner.shape import Shape

BLOCK_TOKENS = 16
"""Tokens of a KV block (vLLM's default)."""

NON_TORCH_GIB = 0.13
"""CUDA context's growth, NCCL: 0.13 GiB on one GPU (vLLM's start-up logs)."""
NON_TORCH_TP_GIB = 0.55
"""With tensor parallelism NCCL adds its buffers."""

BATCHED_TOKENS = 8192
"""Tokens of the largest forward pass, which sizes the activation peak (vLLM's max_num_batched_tokens for servers)."""


@dataclass(frozen=True)
class Format:
    """How a matrix of a block is stored."""

    name: str
    bits: float
    """Bits a weight, with scales."""
    head_too: bool
    """The output head is stored so too."""
    wide_bits: int = 16
    """Bits of the embeddings and norms, and of a head that is not stored so."""

    @property
    def head_bits(self) -> float:
        return self.bits if self.head_too else self.wide_bits


FORMATS = {
    "fp32": Format("fp32", 32, True, wide_bits=32),
    "bf16": Format("bf16", 16, True),
    "fp8": Format("fp8", 8, False),
    "int8": Format("int8", 8, True),
    "int4": Format("int4", 4.25, False),  # groups of 128 share a 16-bit scale and a 16-bit zero
}


def format_of(name: str) -> Format:
    """The format called `name`. Raises ValueError with the known ones."""
    if name not in FORMATS:
        raise ValueError(f"weight format {name!r} is not known; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def weight_bytes(shape: Shape, *, form: Format, tp: int = 1, pp: int = 1) -> float:
    """Bytes of weights on each of tp·pp GPUs (the mean over stages); norms are whole on every TP rank."""
    head, wide = shape.embedding * form.head_bits / 8, form.wide_bits / 8
    embedding = 0 if shape.tied else shape.embedding * wide
    matrices = shape.matrices * form.bits / 8
    rest = shape.parameters - shape.matrices - (1 if shape.tied else 2) * shape.embedding
    return ((matrices + head + embedding) / tp + max(rest, 0) * wide) / pp


def streamed_bytes(shape: Shape, *, form: Format, tp: int = 1) -> float:
    """Bytes of weights that one decoding step reads on each TP rank at most, all stages together: all but the input
    embedding."""
    head = shape.embedding * form.head_bits / 8
    return (shape.matrices * form.bits / 8 + head) / tp


def activation_bytes(shape: Shape, *, tokens: int, sequences: int = 256, tp: int = 1) -> float:
    """Peak of the largest forward pass: residual and MLP of `tokens`, or fp32 logits of `sequences`, whichever is more."""
    mlp = tokens * 2 * (4 * shape.hidden + (3 if shape.gated else 2) * shape.active_ffn / tp + routed_copies(shape))
    logits = sequences * shape.vocab * 10  # 16-bit logits gathered from all ranks, two fp32 copies in the sampler
    return max(mlp, logits)


def routed_copies(shape: Shape) -> int:
    """Values of a token that are copied to and from its experts, on top of what a dense MLP holds."""
    return shape.experts.active * shape.hidden if shape.experts else 0


@dataclass(frozen=True, kw_only=True)
class Cache:
    memory: Estimate
    """KV cache of one GPU, GiB: what utilisation leaves beside the parts."""
    tokens: float
    """Tokens that the cache of the replica holds."""
    blocks: float

    def concurrency(self, *, tokens_per_sequence: float) -> float:
        return self.tokens / tokens_per_sequence


def cache(
    shape: Shape,
    *,
    form: Format,
    device_gib: float,
    utilization: float = 0.9,
    tp: int = 1,
    pp: int = 1,
    kv_bytes: float = 2,
    batched_tokens: int = BATCHED_TOKENS,
    activation_gib: float | None = None,
    non_torch_gib: float | None = None,
) -> Cache:
    """The KV cache that `utilization` of a GPU's `device_gib` leaves (vLLM's accounting). Not below zero."""
    weights = weight_bytes(shape, form=form, tp=tp, pp=pp) / GIB
    if activation_gib is None:
        activation_gib = activation_bytes(shape, tokens=batched_tokens, tp=tp) / GIB
    if non_torch_gib is None:
        non_torch_gib = NON_TORCH_TP_GIB if tp > 1 else NON_TORCH_GIB
    parts = {
        "budget": utilization * device_gib,
        "weights": -weights,
        "activations": -activation_gib,
        "outside PyTorch": -non_torch_gib,
    }
    left = total(
        "GiB",
        parts,
        f"{utilization:.0%} of {device_gib:.2f} GiB less weights, activation peak and what is outside PyTorch (vLLM)",
    )
    per_token = shape.kv_bytes_per_token(bytes_per_value=kv_bytes, tp=tp) / pp
    tokens = max(left.value, 0) * GIB / per_token
    blocks = tokens // BLOCK_TOKENS
    return Cache(memory=left, tokens=blocks * BLOCK_TOKENS, blocks=blocks)
