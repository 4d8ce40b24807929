"""Peak memory of a training rank, by what holds it.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), whose 34·s·b·h
a layer is written out below by tensor, so that grouped-query attention, gated MLPs and flash attention follow from it.
"""

from infra.planner.estimate import GIB, Estimate, total
from infra.planner.run import Run

CONTEXT_GIB = 0.6
"""CUDA context, cuBLAS work space and NCCL buffers outside the allocator: `nvidia-smi` less PyTorch's reserved memory."""

RESERVED = 1.08
"""The caching allocator's reserved memory over what is allocated: blocks split to 512 B…2 MiB and kept for reuse."""

LOGIT_BYTES = {"eager": 12.0, "compiled": 4.0, "chunked": 0.5}
"""Bytes a logit holds at the peak. eager: bf16 logits, their fp32 copy, the log-softmax, and its gradient (2+4+4+2);
vocabulary-parallel eager loss keeps one more fp32 copy, shifted by the global maximum. compiled: fp32 logits alone.
chunked: an eighth of them at a time."""


def layer_bytes(run: Run) -> tuple[float, float]:
    """Bytes that one token keeps in one layer without recomputation, in bf16: (split over TP, whole on each TP rank)."""
    shape = run.shape
    h, q, kv, f = shape.hidden, shape.q_width, shape.kv_width, shape.active_ffn
    if run.trained is not None and not run.adapters_keep_inputs:
        return _adapted_layer_bytes(run), 0
    inner = 2 * q + 4 * kv + 2 * q  # q, k, v, attention's output
    if run.kernels.flash:
        inner += 4 * shape.heads  # the softmax's log-sum-exp
    elif run.recompute != "attention":
        inner += 5 * shape.heads * run.seq  # scores, softmax, dropout mask (5·a·s of the paper)
    # gate, up and product; silu(gate) is kept besides unless fused. Two matrices: input and output of the GELU.
    inner += (6 if run.kernels.fused else 8) * f if shape.gated else 4 * f
    if shape.experts:
        inner += 2 * 2 * shape.experts.active * h  # tokens as sent to their experts, and what comes back
    outer = 2 * _norm_bytes(run)  # inputs of both norms
    gathered = 2 * h + 2 * h  # outputs of both norms: what the column-parallel layers read
    if run.layout.tp == 1 or (run.layout.sequence_parallel and run.kernels.regather):
        return inner + outer + gathered, 0
    if run.layout.sequence_parallel:
        return inner + outer, gathered
    return inner, outer + gathered


def _norm_bytes(run: Run) -> float:
    """Bytes that a norm keeps of its input: in bf16, or where it is written out in Python, in fp32 and normalised once more."""
    wide = run.kernels.wide_norms and run.shape.gated
    if not wide:
        return 2 * run.shape.hidden
    return (4 if run.trained is not None else 6) * run.shape.hidden


def _adapted_layer_bytes(run: Run) -> float:
    """`layer_bytes` under LoRA: a frozen product needs no input for its weight's gradient, so that what only feeds products goes."""
    shape = run.shape
    h, q, kv, f = shape.hidden, shape.q_width, shape.kv_width, shape.active_ffn
    attention = (
        2 * (q + 2 * kv) + 2 * (q + kv) + 2 * q + 4 * shape.heads
    )  # as projected, q and k rotated, output, log-sum-exp
    mlp = (4 if run.kernels.fused else 6) * f if shape.gated else 2 * f  # gate, silu(gate), up; or the GELU's input
    return attention + mlp + 2 * _norm_bytes(run) + 3 * h  # and the adapter's input: dropout's mask and output


def kept_bytes(run: Run) -> float:
    """Bytes that one token keeps in one layer until its backward pass, on one rank."""
    split, whole = layer_bytes(run)
    t, h, shape = run.layout.tp, run.shape.hidden, run.shape
    everything = split / t + whole
    boundary = 2 * h / (t if run.layout.sequence_parallel else 1)
    match run.recompute:
        case "none" | "attention":
            return everything
        case "full":
            return boundary
        case "every-2nd":
            return (everything + boundary) / 2
        case "matmul":
            # torchtitan keeps attention's output and the 1st, 3rd, 5th and 7th product of a block: q, v, gate and down.
            products = shape.q_width + shape.kv_width + shape.active_ffn + (h if shape.gated else 0)
            return boundary + (2 * shape.q_width + 4 * shape.heads + 2 * products) / t


def in_flight(run: Run, *, stage: int) -> float:
    """Micro-batches whose activations stage `stage` holds at once under 1F1B (interleaved: × (1 + (p−1)/(p·v)))."""
    p, v = run.layout.pp, run.layout.vpp
    if v > 1:
        return min(p * (1 + (p - 1) / (p * v)) - stage / v, run.micro_batches)
    return min(p - stage, run.micro_batches)


def stage_memory(run: Run, *, stage: int) -> dict[str, float]:
    """Bytes on a rank of pipeline stage `stage` at its peak, allocated, by part."""
    shape, layout = run.shape, run.layout
    first, last = stage == 0, stage == layout.pp - 1
    layers = run.stage_layers(stage)
    ends = shape.embedding * (1 if first and last and shape.tied else int(first) + int(last)) / layout.tp
    spread = layers * shape.routed_matrices / shape.layers / layout.tp  # experts of this stage, all of them
    parameters = layers * shape.block / layout.tp + ends
    trained = parameters if run.trained is None else run.trained / layout.pp / layout.tp
    state = trained * run.states.per_parameter(zero=layout.zero, shards=layout.shards)
    if layout.ep > 1 and run.trained is None:
        # Experts are divided among the ranks already, and what ZeRO shards of them over those that hold the same.
        each = run.states.per_parameter(zero=layout.zero, shards=max(layout.shards // layout.ep, 1))
        state += spread * (each / layout.ep - run.states.per_parameter(zero=layout.zero, shards=layout.shards))
        parameters -= spread * (1 - 1 / layout.ep)
    if run.trained is not None:
        state += run.frozen_bytes * parameters / (layout.shards if layout.zero == 3 else 1)
    split, whole = layer_bytes(run)
    wide = run.value_bytes / 2
    working_layer = wide * run.tokens * (split / layout.tp + whole)
    kept = wide * run.tokens * kept_bytes(run) * layers * in_flight(run, stage=stage)
    # Backward of one layer: what was dropped is there again, with the gradients of about half of it; compiled code fuses those.
    again = working_layer if run.recompute in ("matmul", "every-2nd", "full") else 0
    transient = again + working_layer * (0.25 if run.kernels.fused else 0.5)
    # At the loss there are also the last norm's input and output, and the gradient of the latter; whole on each rank under TP.
    at_once = min(run.tokens * shape.vocab / layout.tp, run.kernels.logits_at_once or float("inf"))
    logits = at_once * _logit_bytes(run) + run.tokens * 6 * shape.hidden if last else 0
    return {
        "weights, gradients, optimizer": state,
        "gathered weights and buckets": _gathered(run, parameters=parameters, ends=ends),
        "activations": kept,
        "logits and loss" if logits > transient else "backward of one layer": max(logits, transient),
    }


def _logit_bytes(run: Run) -> float:
    sharded = run.layout.tp > 1 and run.kernels.loss == "eager" and not run.kernels.regather
    return LOGIT_BYTES[run.kernels.loss] + (4 if sharded else 0)


def _gathered(run: Run, *, parameters: float, ends: float) -> float:
    """Bytes of what sharding puts together again for use, and of gradient buckets."""
    layout = run.layout
    block = local_block(run)
    if layout.zero == 3 and layout.fsdp * layout.cp > 1:
        if layout.pp > 1 and run.kernels.unsharded_pipeline:
            return parameters * (2 + run.reduce_bytes)
        # Two blocks in bf16 (one in use, the next coming), one block's gradients in bf16 and as reduced, and the embeddings.
        return 2 * 2 * block + (2 + run.reduce_bytes) * block + 2 * ends
    if layout.zero == 2 and layout.fsdp > 1:
        return 2 * parameters + (2 + run.reduce_bytes) * block
    if layout.batch_ranks > 1 and run.states.master == 0 and not run.kernels.bucket_view:
        return 4 * (run.trained or parameters)  # DDP's buckets are a second copy of the gradients
    return 0


def local_block(run: Run) -> float:
    """Parameters of a block that one rank computes with: split over TP, its experts over EP."""
    experts = run.shape.routed_matrices / run.shape.layers
    return (run.shape.block - experts * (1 - 1 / run.layout.ep)) / run.layout.tp


def memory(run: Run, *, statistic: str = "reserved", stage: int | None = None) -> Estimate:
    """Peak memory of a rank, GiB: of the fullest pipeline stage, or of `stage`; 'allocated', 'reserved' or 'device'."""
    stages = (0, run.layout.pp - 1) if stage is None else (stage,)
    parts = max((stage_memory(run, stage=s) for s in stages), key=lambda found: sum(found.values()))
    gib = {name: value / GIB for name, value in parts.items() if value}
    if statistic in ("reserved", "device"):
        gib["allocator"] = (RESERVED - 1) * sum(gib.values())
    if statistic == "device":
        gib["CUDA context, NCCL"] = CONTEXT_GIB
    per = run.states.per_parameter(zero=run.layout.zero, shards=run.layout.shards)
    return total(
        "GiB",
        gib,
        f"{per:.4g} bytes of state a parameter on each rank (ZeRO-{run.layout.zero} over {run.layout.shards})",
        f"recomputation: {run.recompute}; activations after Korthikanti et al. 2022, table 2, "
        + ("flash attention" if run.kernels.flash else "scores in memory"),
        f"{run.kernels.loss} loss: {_logit_bytes(run):g} bytes a logit",
        f"memory {statistic}; the allocator reserves {RESERVED:g} × what it hands out",
    )
