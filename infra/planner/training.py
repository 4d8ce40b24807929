"""What a training run needs: memory of a rank, time, price. Data-parallel ranks, each with the whole model."""

from dataclasses import dataclass

from infra.catalog import Instance, gpu
from infra.planner.estimate import GIB, Estimate, total
from infra.planner.shape import Shape
from infra.spec import NodePool, Training

STATE_BYTES = 16
"""fp32 master weight, gradient and two Adam moments a parameter: DDP without sharding (ZeRO, sec. 3, with fp32 gradients)."""

GPU_EFFICIENCY = 0.40
"""Share of peak bf16 FLOP/s that a dense decoder of this trainer reaches: eager DDP, flash attention."""

RUNTIME_GIB = {"gpu": 1.0, "cpu": 0.45}
"""CUDA context, NCCL and allocator slack of a rank; torch's own pages on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    name: str
    pool: str
    ranks: int
    parameters: int
    tokens: int
    memory: Estimate
    """Peak of one rank, GiB."""
    memory_limit_gib: float
    """What one rank may use: the GPU's memory, or its share of the pod's."""
    hours: Estimate
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs utilisation against dense bf16 peak, full attention; None on a CPU, whose peak is not known."""
    usd: float | None
    """Price of the run on demand; None when an instance has no price."""


def ranks_per_node(training: Training, instance: Instance) -> int:
    """Ranks of one pod: as declared, else one for each GPU, else one."""
    return training.nproc_per_node or instance.gpus or 1


def plan_training(training: Training, *, pool: NodePool, instance: Instance) -> TrainingPlan:
    """Estimate a run on `training.nodes` nodes of `pool`."""
    per_node = ranks_per_node(training, instance)
    ranks = training.nodes * per_node
    tokens = training.steps * training.global_batch * training.seq
    tokens_per_s, mfu, why = _speed(training, instance=instance, ranks=ranks)
    hours = Estimate(value=tokens / tokens_per_s / 3600, unit="h", assumptions=(why,))
    usd = None if instance.price is None else instance.price * training.nodes * hours.value
    return TrainingPlan(
        name=training.name,
        pool=pool.name,
        ranks=ranks,
        parameters=Shape.of(training.model, vocab_size=training.data.vocab_size).parameters,
        tokens=tokens,
        memory=memory(training, on_gpu=instance.gpu is not None),
        memory_limit_gib=memory_limit_gib(training, instance=instance),
        hours=hours,
        tokens_per_s=tokens_per_s,
        mfu=mfu,
        usd=usd,
    )


def memory(training: Training, *, on_gpu: bool) -> Estimate:
    """Peak memory of one rank, GiB: states, activations without recomputation, logits, runtime.

    Activations a layer: s·b·h·(34 → 18 + 4f/h) bytes at 2 bytes a value with flash attention (Korthikanti et al. 2022,
    with the gated MLP's width), twice that in fp32; eager cross-entropy keeps about 12 bytes a logit.
    """
    model, wide = training.model, 2 if on_gpu else 4
    tokens = training.micro_batch * training.seq
    layer = tokens * model.hidden * (18 + 4 * model.ffn / model.hidden) * wide / 2
    n = Shape.of(model, vocab_size=training.data.vocab_size).parameters
    return total(
        "GiB",
        {
            "weights, gradients, optimizer": n * STATE_BYTES / GIB,
            "gradient buckets": n * 4 / GIB,
            "activations": model.layers * layer / GIB,
            "logits": 12 * tokens * training.data.vocab_size / GIB,
            "runtime": RUNTIME_GIB["gpu" if on_gpu else "cpu"],
        },
        f"{STATE_BYTES} bytes of state a parameter (DDP, fp32 master, AdamW)",
        "no recomputation, attention that stores no scores (Korthikanti et al. 2022)",
    )


def memory_limit_gib(training: Training, *, instance: Instance) -> float:
    """What one rank may use, GiB."""
    if instance.gpu is not None:
        return gpu(instance.gpu).memory_gib
    pod = training.resources.memory_gib if training.resources else instance.allocatable_gib
    return pod / ranks_per_node(training, instance)


def _speed(training: Training, *, instance: Instance, ranks: int) -> tuple[float, float | None, str]:
    flops = Shape.of(training.model, vocab_size=training.data.vocab_size).flops_per_token(seq=training.seq)
    if instance.gpu is not None:
        rate = ranks * gpu(instance.gpu).tflops_bf16 * 1e12 * GPU_EFFICIENCY
        return rate / flops, GPU_EFFICIENCY, f"{GPU_EFFICIENCY:.0%} of dense bf16 peak"
    cpus = min(instance.cpus, training.nodes * (training.resources.cpus if training.resources else instance.cpus))
    rate = cpus * instance.gflops_per_cpu * 1e9
    return (
        rate / flops,
        None,
        f"{instance.gflops_per_cpu:g} GFLOP/s reached on a CPU core (catalogue, measured with this trainer)",
    )
