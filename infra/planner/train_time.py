"""Time of a training step: kernels, exposed communication, pipeline bubble, optimizer."""

from dataclasses import dataclass

from infra.catalog import Gpu
from infra.planner.collectives import Group, collective_s
from infra.planner.estimate import Estimate, total
from infra.planner.kernels import attention_s, gemm_s, stream_s
from infra.planner.run import Run
from infra.planner.train_memory import local_block

LAUNCH_S = 6e-6
"""Host time to launch one kernel from eager Python."""
KERNELS_PER_LAYER = {True: 45, False: 90}
"""Kernels of a layer's forward and backward pass, fused or not; the GPU waits for the host when they are shorter than launches."""

CONTENTION = 0.25
"""Share of hidden communication that is paid after all: collectives take SMs and memory bandwidth from the kernels beside them."""

OVERHEAD = 0.02
"""Data loading, logging, clipping and the loop itself."""

DDP_BUCKET_BYTES = 25e6
"""PyTorch DDP's `bucket_cap_mb`."""


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer for one micro-batch on one rank."""

    forward: float
    backward: float
    """Without recomputation."""
    again: float
    """Recomputation."""
    tp: float
    """Exposed communication of tensor and expert parallelism, all passes."""
    cp: float

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.again

    @property
    def all(self) -> float:
        return self.compute + self.tp + self.cp


def layer_time(run: Run, *, gpu: Gpu, node: int) -> LayerTime:
    """Kernels and the communication inside a layer."""
    shape, t, tokens = run.shape, run.layout.tp, run.tokens
    h = shape.hidden
    products = [(tokens, h, (shape.q_width + 2 * shape.kv_width) / t), (tokens, shape.q_width / t, h)]
    linear = sum(gemm_s(m=m, n=n, k=k, gpu=gpu, fp8=run.kernels.fp8) for m, k, n in products) + _mlp_s(run, gpu=gpu)
    scores = 4 * tokens * run.seq * shape.q_width / t  # both products, full
    if run.kernels.flash:
        # Causal attention computes half the scores; backward computes them again: five products to the forward's two.
        attention = attention_s(flops=scores / 2, gpu=gpu, generation=run.kernels.attention)
        attention_back = 2.5 * attention
    else:
        # Two batched products over all scores; scale, mask, softmax and dropout each read and write 2 bytes a score.
        moved = (8 if run.kernels.fused else 16) * tokens * run.seq * shape.heads / t
        attention = attention_s(flops=scores, gpu=gpu) + stream_s(moved_bytes=moved, gpu=gpu)
        attention_back = 2 * attention
    element = stream_s(moved_bytes=tokens * _elementwise_bytes(run), gpu=gpu)
    forward = linear + attention + element
    # A product's backward pass is two, of its input's and of its weight's gradient; frozen weights (LoRA) need the first alone.
    backward = (2 if run.trained is None else 1) * linear + attention_back + 2 * element
    again = {
        "none": 0.0,
        "attention": attention,
        "matmul": linear * _products_again(run) + element,
        "every-2nd": forward / 2,
        "full": forward,
    }[run.recompute]
    launches = KERNELS_PER_LAYER[run.kernels.fused] * LAUNCH_S
    shortage = max(launches - (forward + backward + again), 0)
    passes = 4 + (2 * again / forward if run.recompute in ("full", "every-2nd") else 0)
    tp = 0.0
    if t > 1:
        # Two all-reduces forward and two backward, or as many pairs of all-gather and reduce-scatter (Shoeybi et al. 2019).
        group = Group(size=t, node=node)
        message = 2 * tokens * h
        tp = passes * collective_s("all_reduce", message_bytes=message, gpu=gpu, group=group)
        tp *= 1 - run.kernels.tp_hidden
    if run.layout.ep > 1 and shape.experts:
        # Tokens go to their experts and come back, forward and backward.
        group = Group(size=run.layout.ep, stride=t, node=node)
        sent = 2 * tokens * shape.experts.active * h * (1 - shape.experts.dense_layers / shape.layers)
        tp += passes * collective_s("all_to_all", message_bytes=sent, gpu=gpu, group=group)
    cp = 0.0
    if run.layout.cp > 1:
        group = Group(size=run.layout.cp, stride=t, node=node)
        kv = 2 * 2 * shape.kv_width / t * tokens * run.layout.cp
        moved = 3 * collective_s("all_gather", message_bytes=kv, gpu=gpu, group=group)
        cp = max(moved - attention - attention_back, 0) + CONTENTION * min(moved, attention + attention_back)
    return LayerTime(forward=forward, backward=backward + shortage, again=again, tp=tp, cp=cp)


def _mlp_s(run: Run, *, gpu: Gpu) -> float:
    """Seconds of one layer's MLP, forward, in the mean over layers: two products, or as many for each expert that a rank holds."""
    shape, t, e = run.shape, run.layout.tp, run.shape.experts

    def pair(tokens: float, width: float) -> float:
        up, down = ((shape.hidden, (2 if shape.gated else 1) * width / t), (width / t, shape.hidden))
        return sum(gemm_s(m=tokens, n=n, k=k, gpu=gpu, fp8=run.kernels.fp8) for k, n in (up, down))

    if e is None:
        return pair(run.tokens, shape.ffn)
    local = e.count / run.layout.ep
    # A rank's experts get the tokens of all ranks that share them: as many as it sends when routing is balanced.
    mixture = local * pair(run.tokens * e.active / local, e.ffn)
    mixture += pair(run.tokens, e.shared_ffn) if e.shared_ffn else 0
    dense = e.dense_layers / shape.layers
    return dense * pair(run.tokens, shape.ffn) + (1 - dense) * mixture


def _elementwise_bytes(run: Run) -> float:
    """Bytes that a token's element-wise work moves in one layer's forward pass: norms, residuals, rotary embedding, activation.

    Fused, each chain reads its input and writes its output once: 2 norms, 2 residual sums (3 streams), the rotary embedding of
    queries and keys, gate·up (3 streams of the MLP's width) or GELU (2). Eager norms and rotary embeddings go over fp32 copies.
    """
    shape, sharded = run.shape, run.layout.tp
    outer = sharded if run.layout.sequence_parallel else 1
    residual = (10 if run.kernels.fused else 26) * shape.hidden / outer
    inner = (2 if run.kernels.fused else 8) * (shape.q_width + shape.kv_width) + (
        (3 if run.kernels.fused else 5) if shape.gated else (2 if run.kernels.fused else 4)
    ) * shape.active_ffn
    if shape.experts:
        inner += 4 * shape.experts.active * shape.hidden  # copied to the experts, and summed from them
    return 2 * (residual + inner / sharded)


def _products_again(run: Run) -> float:
    """Share of a layer's linear FLOPs that torchtitan's selective recomputation repeats: the 2nd, 4th and 6th product of a block."""
    shape = run.shape
    again = shape.hidden * (shape.kv_width + shape.q_width + shape.active_ffn)
    return again * shape.layers / shape.active_matrices


def _sharded_comm(run: Run, *, gpu: Gpu, node: int) -> float:
    """Seconds that one block's weights and gradients spend on the wire in a micro-batch under ZeRO-3."""
    layout = run.layout
    stride = layout.tp
    group = Group(size=layout.fsdp * layout.cp, stride=stride, node=node)
    pieces = run.kernels.collectives_per_block
    block = local_block(run)
    gather = collective_s("all_gather", message_bytes=2 * block / pieces, gpu=gpu, group=group)
    scatter = collective_s("reduce_scatter", message_bytes=run.reduce_bytes * block / pieces, gpu=gpu, group=group)
    return pieces * ((2 if layout.zero == 3 else 1) * gather + scatter)


def step_time(run: Run, *, gpu: Gpu, node: int = 8) -> Estimate:
    """Seconds of one optimizer step on the slowest rank, by what it is spent on."""
    layout, shape = run.layout, run.shape
    layers = max(run.stage_layers(stage) for stage in {0, layout.pp - 1})
    layer = layer_time(run, gpu=gpu, node=node)
    head = 3 * gemm_s(m=run.tokens, n=shape.vocab / layout.tp, k=shape.hidden, gpu=gpu)
    loss = stream_s(moved_bytes=run.tokens * shape.vocab / layout.tp * (16 if run.kernels.fused else 30), gpu=gpu)
    # An uneven stage with the head waits for the others; cut evenly, the last stage is the slowest by the head.
    ends = head + loss if layout.pp == 1 or not run.kernels.split_by_cost else 0.0
    per_micro = layers * layer.all + ends
    compute = run.micro_batches * (layers * layer.compute + ends)
    inside = run.micro_batches * layers * (layer.tp + layer.cp)
    bubble = (layout.pp - 1) / layout.vpp * per_micro
    exposed = _exposed(run, layer=layer, layers=layers, gpu=gpu, node=node)
    parameters = layers * local_block(run) + shape.embedding / layout.tp
    own = parameters / (layout.shards if layout.zero else 1)
    optimizer = stream_s(moved_bytes=30 * own, gpu=gpu)
    if run.kernels.accumulates_wide:
        optimizer += stream_s(moved_bytes=(2 + 4 + 4) * parameters * run.micro_batches, gpu=gpu)
    hops = 0.0
    if layout.pp > 1:
        group = Group(
            size=2, stride=node if layout.tp * layout.fsdp * layout.cp * layout.dp >= node else layout.tp, node=node
        )
        hop = collective_s("send", message_bytes=2 * run.tokens * shape.hidden / layout.tp, gpu=gpu, group=group)
        hops = 2 * hop * (layout.pp - 1) + 2 * hop * run.micro_batches * layout.vpp * CONTENTION
    parts = {
        "compute": compute,
        "tensor and context parallel": inside,
        "pipeline bubble": bubble,
        "pipeline hops": hops,
        "gradients and weights": exposed,
        "optimizer": optimizer,
    }
    parts["loop"] = OVERHEAD * sum(parts.values())
    return total(
        "s",
        {name: value for name, value in parts.items() if value},
        "matrix products at their roofline, flash attention and element-wise traffic (infra/planner/kernels.py)",
        "collectives by NCCL's latency and bandwidth model (infra/planner/collectives.py)",
        f"1F1B, bubble (p−1)/(m·v) with p={layout.pp}, m={run.micro_batches}, v={layout.vpp} (Narayanan et al. 2021)",
    )


def _exposed(run: Run, *, layer: LayerTime, layers: float, gpu: Gpu, node: int) -> float:
    """Seconds of data-parallel communication in a step that compute does not hide."""
    layout, shape = run.layout, run.shape
    exposed = 0.0
    stride = layout.tp
    if layout.fsdp * layout.cp > 1 and layout.zero in (2, 3):
        per_block = _sharded_comm(run, gpu=gpu, node=node)
        once = layout.pp > 1 and run.kernels.unsharded_pipeline
        times = 1 if once else run.micro_batches
        exposed += times * layers * _not_hidden(per_block, layer.all, overlap=run.kernels.overlap_dp)
        ends = per_block / (local_block(run) * layout.tp) * shape.embedding * (1 if shape.tied else 2)
        exposed += ends * (
            0.5 if times > 1 or layout.pp > 1 else 0.75
        )  # the first gather and the last scatter have nothing beside them
        replicas, replica_stride = layout.dp, stride * layout.fsdp * layout.cp
        share = layout.fsdp * layout.cp
    else:
        replicas, replica_stride, share = layout.dp * layout.fsdp * layout.cp, stride, 1
    if replicas > 1:
        parameters = (layers * local_block(run) + shape.embedding / layout.tp) / share
        if run.trained is not None:
            parameters = run.trained / layout.pp / layout.tp / share
        group = Group(size=replicas, stride=min(replica_stride, node), node=node)
        buckets = max(parameters * run.reduce_bytes / DDP_BUCKET_BYTES, 1)
        size = parameters * run.reduce_bytes / buckets
        if layout.zero in (1, 2):
            each = collective_s("reduce_scatter", message_bytes=size, gpu=gpu, group=group)
            gather = collective_s("all_gather", message_bytes=size * 2 / run.reduce_bytes, gpu=gpu, group=group)
            exposed += buckets * gather * (CONTENTION if run.kernels.overlap_gather else 1)
        else:
            each = collective_s("all_reduce", message_bytes=size, gpu=gpu, group=group)
        last_backward = layers * (layer.backward + layer.again + layer.tp)
        if run.meets_every_steps > 1:  # apart, and then with nothing beside it
            exposed += buckets * each / run.meets_every_steps
        else:
            exposed += _not_hidden(buckets * each, last_backward, overlap=run.kernels.overlap_dp)
    return exposed


def _not_hidden(comm: float, compute: float, *, overlap: bool) -> float:
    """What of `comm` seconds shows beside `compute` seconds."""
    if not overlap:
        return comm
    return max(comm - compute, 0) + CONTENTION * min(comm, compute)


def hardware_flops_share(run: Run) -> float:
    """FLOPs that the hardware does over those of the model (HFU over MFU): a third more where every layer runs forward twice."""
    return {"full": 4 / 3, "every-2nd": 7 / 6, "matmul": 1 + _products_again(run) / 3}.get(run.recompute, 1.0)


def tokens_per_s_per_gpu(run: Run, step_s: float) -> float:
    return run.tokens_per_step / step_s / run.layout.gpus
