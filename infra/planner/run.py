"""What a training run is to the planner: a shape, a batch, a layout over GPUs, and how numbers are kept."""

from dataclasses import dataclass, field
from typing import Literal

from infra.planner.shape import Shape

Recompute = Literal["none", "attention", "matmul", "every-2nd", "full"]
"""Activations computed again in the backward pass. none: all kept. attention: only scores (Megatron's `selective`; with flash
attention nothing more is saved). matmul: every second matrix product and all element-wise work (torchtitan's `selective op`).
every-2nd: every second layer whole. full: every layer whole."""

Loss = Literal["eager", "compiled", "chunked"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over dp × fsdp × tp × pp × cp GPUs. Ranks of one TP group are neighbours, then CP, FSDP, DP, PP."""

    dp: int = 1
    """Replicas; their gradients are summed."""
    fsdp: int = 1
    """Ranks that shard parameters (ZeRO-3 by default) and split the batch."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    """Ranks that split a sequence; FSDP shards over them too."""
    vpp: int = 1
    """Model chunks of a pipeline stage (interleaved 1F1B)."""
    ep: int = 1
    """Of the ranks that see different sequences, how many spread a layer's experts among them."""
    zero: Literal[0, 1, 2, 3] = 3
    """What the sharding ranks share: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights."""
    sequence_parallel: bool = True
    """Norms and residuals are split over the TP ranks (Megatron's SP)."""

    @property
    def gpus(self) -> int:
        return self.dp * self.fsdp * self.tp * self.pp * self.cp

    @property
    def batch_ranks(self) -> int:
        """Ranks that see different sequences."""
        return self.dp * self.fsdp

    @property
    def shards(self) -> int:
        """Ranks that share what `zero` says: the FSDP group with its CP ranks, or all replicas under ZeRO-1 and 2."""
        return self.fsdp * self.cp * (1 if self.zero == 3 else self.dp)


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that a parameter holds between steps."""

    weight: float
    """What the forward pass reads."""
    gradient: float
    master: float
    """A wider copy of the weight, kept by the optimizer; 0 when `weight` is that."""
    moments: float

    def per_parameter(self, *, zero: int, shards: int) -> float:
        """Bytes a rank keeps for one parameter: what ZeRO shards is divided by `shards` (Rajbhandari et al. 2020, sec. 5)."""
        return (
            self.weight / (shards if zero >= 3 else 1)
            + self.gradient / (shards if zero >= 2 else 1)
            + (self.master + self.moments) / (shards if zero >= 1 else 1)
        )


FP32 = States(weight=4, gradient=4, master=0, moments=8)
"""fp32 parameters, bf16 compute: PyTorch DDP and FSDP with mixed precision."""
MEGATRON = States(weight=2, gradient=4, master=4, moments=8)
"""18 bytes; with the distributed optimizer 6 + 12/dp (Megatron-LM)."""
NANOTRON = States(weight=2, gradient=6, master=4, moments=8)
"""20 bytes: gradients in bf16 and again accumulated in fp32."""
DEEPSPEED = States(weight=2, gradient=2, master=4, moments=8)
"""16 bytes: half-precision weights and gradients (ZeRO paper, sec. 3.1)."""
PURE = States(weight=2, gradient=2, master=0, moments=4)
"""All in bf16."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """How the framework runs a step; each is a fact of the code and no fit."""

    fused: bool = True
    """Element-wise chains run as one kernel (compiled, or hand-fused)."""
    flash: bool = True
    """Attention keeps no scores."""
    attention: Literal["flash1", "flash2", "flash3"] = "flash2"
    """Generation of the flash attention kernel."""
    loss: Loss = "eager"
    logits_at_once: int | None = None
    """Most logits that exist at a time; None: all of a forward pass."""
    regather: bool = False
    """Backward gathers a column-parallel layer's input again (Megatron) and does not keep the gathered copy."""
    tp_hidden: float = 0.0
    """Share of tensor-parallel communication that runs beside matrix products: 0.75 of Megatron's (what contends stays), half of
    torchtitan's async TP, which hides the gathers and scatters of one side of a product at a time."""
    overlap_dp: bool = True
    """Gradient and parameter collectives run beside compute."""
    overlap_gather: bool = False
    """Under ZeRO-1 and 2 the gathering of updated weights runs beside the next forward pass."""
    wide_norms: bool = False
    """RMSNorm is written out in Python, in fp32 (Transformers, LitGPT)."""
    accumulates_wide: bool = False
    """Each micro-batch's bf16 gradients are added to fp32 ones by a kernel of its own."""
    split_by_cost: bool = False
    """Pipeline stages are cut so that the output head counts as work (nanotron); else layers are cut evenly."""
    unsharded_pipeline: bool = True
    """FSDP inside a pipeline keeps gathered weights and whole gradients over the micro-batches (torchtitan)."""
    bucket_view: bool = False
    """DDP's buckets are where the gradients live (`gradient_as_bucket_view`), and no copy of them."""
    collectives_per_block: int = 1
    """Messages that a block's sharded weights travel in."""
    fp8: bool = False
    """Linear layers multiply in fp8."""


@dataclass(frozen=True, kw_only=True)
class Run:
    shape: Shape
    seq: int
    micro_batch: int
    """Sequences in one forward pass of a rank (of a pipeline, in one slot)."""
    micro_batches: int
    """Forward passes in a step."""
    layout: Layout = Layout()
    recompute: Recompute = "none"
    states: States = FP32
    reduce_bytes: int = 4
    """Bytes of a gradient on the wire."""
    kernels: Kernels = field(default=Kernels())
    value_bytes: int = 2
    """Bytes of an activation."""
    trained: int | None = None
    """Parameters that are trained; None: all. LoRA trains few, and the frozen ones keep only their weights."""
    frozen_bytes: float = 2
    """Bytes of a frozen weight between steps."""
    meets_every_steps: int = 1
    """Steps between two at which replicas exchange anything: above 1 under local SGD."""
    adapters_keep_inputs: bool = False
    """The input of every matrix is kept for its adapter's gradient: activations as in training the whole."""

    @property
    def tokens(self) -> int:
        """Tokens that one rank works on in a forward pass."""
        return self.micro_batch * self.seq // self.layout.cp

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.seq * self.micro_batches * self.layout.batch_ranks

    def stage_layers(self, stage: int) -> float:
        """Layers of pipeline stage `stage`: even, or cut by cost with the head counting as its parameters do."""
        p, layers = self.layout.pp, self.shape.layers
        if not self.kernels.split_by_cost or p == 1:
            return layers / p
        head = self.shape.embedding * layers / self.shape.active_matrices
        each = (layers + head) / p
        return max(each - head, 0) if stage == p - 1 else (layers - max(each - head, 0)) / (p - 1)


def check_layout(shape: Shape, layout: Layout) -> None:
    """Raise ValueError for a layout that the shape does not allow, with the nearest that it does."""
    for name, size in (("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp), ("dp", layout.dp)):
        if size < 1:
            raise ValueError(f"{name} {size} is below 1")
    experts = shape.experts.count if shape.experts else 1
    if layout.ep < 1 or experts % layout.ep:
        raise ValueError(f"ep {layout.ep} does not divide {experts} experts; {_nearest(max(layout.ep, 1), of=experts)}")
    if layout.batch_ranks * layout.cp % layout.ep:
        raise ValueError(f"ep {layout.ep} does not divide the {layout.batch_ranks * layout.cp} data-parallel ranks")
    if shape.heads % layout.tp:
        raise ValueError(f"tp {layout.tp} does not divide {shape.heads} heads; {_nearest(layout.tp, of=shape.heads)}")
    if layout.pp > shape.layers:
        raise ValueError(f"pp {layout.pp} is above {shape.layers} layers; the most is {shape.layers}")
    if layout.pp * layout.vpp > shape.layers:
        most = shape.layers // layout.pp
        raise ValueError(f"pp {layout.pp} × vpp {layout.vpp} is above {shape.layers} layers; the most vpp is {most}")


def _nearest(value: int, *, of: int) -> str:
    divisors = [n for n in range(1, of + 1) if of % n == 0]
    below, above = max(n for n in divisors if n <= value), min((n for n in divisors if n >= value), default=of)
    return f"the nearest that do are {below} and {above}" if below != above else f"the nearest that does is {below}"


def micro_batches(*, global_batch: int, micro_batch: int, ranks: int) -> int:
    """Forward passes in a step. Raises ValueError when `global_batch` is no multiple, with the nearest that are."""
    once = micro_batch * ranks
    if global_batch % once or global_batch < once:
        near = sorted({max(global_batch // once, 1) * once, -(-global_batch // once) * once})
        raise ValueError(
            f"global batch {global_batch} is no multiple of micro-batch {micro_batch} × {ranks} ranks = {once}; "
            f"the nearest are {' and '.join(map(str, near))}"
        )
    return global_batch // once
