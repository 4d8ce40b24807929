"""What a training run needs: memory of a rank, time, price on demand and on spot capacity."""

from dataclasses import dataclass, replace
from math import inf, isfinite

from infra.catalog import Instance
from infra.planner import cpu
from infra.planner.adapters import adapted, meeting_s
from infra.planner.estimate import GIB, Estimate
from infra.planner.machine import gpu_on
from infra.planner.run import FP32, Kernels, Layout, Recompute, Run, check_layout
from infra.planner.shape import Shape
from infra.planner.spot import best_interval_s, interrupted, save_s
from infra.planner.train_memory import memory
from infra.planner.train_time import hardware_flops_share, step_time
from infra.spec import NodePool, Parallelism, Training, Unplannable

TRAINER = Kernels(fused=False, wide_norms=True, bucket_view=True, logits_at_once=1 << 26)
"""How this repository's trainer runs a step: eager PyTorch, its own RMSNorm, loss over fp32 logits (trainer/loss.py), in pieces."""

COMPILED = replace(TRAINER, fused=True, wide_norms=False)
"""The same with `parallelism.compile`: each block is one graph, whose element-wise chains Inductor fuses."""

RECOMPUTE: dict[str, Recompute] = {"none": "none", "selective": "matmul", "full": "full"}
"""What a stack calls it, and what the planner does."""

NOT_TENSORS = ("allocator", "CUDA context, NCCL")
"""Parts of a GPU's memory that `torch.cuda.max_memory_allocated` does not count."""

FP32_SPEED = 0.5
"""Peak of TF32 products over bf16's (data sheets of A100 and H100)."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    name: str
    pool: str
    ranks: int
    replicas: int
    """Copies of the model among the ranks."""
    layout: str
    """`dp 16`, `fsdp 8 · tp 2`: how the ranks share the work."""
    parameters: int
    tokens: int
    memory: Estimate
    """Peak of one rank, GiB."""
    memory_limit_gib: float
    """What one rank may use: the GPU's memory, or its share of the pod's."""
    allocated_bytes: float
    """What the trainer will measure of `memory`: all that tensors hold on a GPU, the process's pages on a CPU."""
    peak_flops_per_rank: float | None
    """Dense FLOP/s of the rank's GPU in the type of its products; None on a CPU."""
    step: Estimate
    """Time of one optimizer step, seconds."""
    hours: Estimate
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs utilisation against dense bf16 peak, full attention (PaLM); None on a CPU, whose peak is not known."""
    hfu: float | None
    """With what is computed again."""
    usd: float | None
    """Price of the run on demand; None when an instance has no price."""
    usd_spot: float | None
    """With the restarts that interruptions cost; None where no price is known or the run would hardly end."""
    hours_spot: float | None
    interruptions: float
    """Expected on spot capacity."""
    best_checkpoint_s: float
    """Interval between checkpoints that costs the least under the assumed rate of interruptions (Young 1974)."""
    best_checkpoint_steps: int


def ranks_per_node(training: Training, instance: Instance) -> int:
    """Ranks of one pod: as declared, else one for each GPU, else one."""
    return training.nproc_per_node or instance.gpus or 1


def layout_of(parallelism: Parallelism, *, ranks: int) -> Layout:
    """The layout that a stack declares, replicas filling up what is left. Raises ValueError when it does not divide the ranks."""
    inside = parallelism.fsdp * parallelism.tp * parallelism.pp * parallelism.cp
    if ranks % inside:
        near = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"fsdp × tp × pp × cp = {inside} does not divide {ranks} ranks; the nearest that does is "
            f"{min(near, key=lambda n: (abs(n - inside), n))}"
        )
    return Layout(
        dp=ranks // inside,
        fsdp=parallelism.fsdp,
        tp=parallelism.tp,
        pp=parallelism.pp,
        cp=parallelism.cp,
        vpp=parallelism.vpp,
        zero=3 if parallelism.fsdp > 1 else 0,
    )


def checked_layout(training: Training, *, ranks: int) -> Layout:
    """The layout of a training on `ranks` ranks, of each of its launches where it has several.

    Raises `Unplannable` for one that ranks or model do not allow.
    """
    try:
        layout = layout_of(training.layout, ranks=ranks // training.launches)
        check_layout(Shape.of(training.shape, vocab_size=training.data.vocab_size), layout)
    except ValueError as error:
        raise Unplannable("training.parallelism", str(error)) from None
    return layout


def run_of(training: Training, *, ranks: int) -> Run:
    """The run that the training declares, on GPUs, or one of its launches. Raises ValueError for a layout that the model does not allow."""
    shape = Shape.of(training.shape, vocab_size=training.data.vocab_size)
    layout = checked_layout(training, ranks=ranks)
    at_once = training.micro_batch * layout.batch_ranks * training.launches
    run = Run(
        shape=shape,
        seq=training.seq,
        micro_batch=training.micro_batch,
        micro_batches=-(-training.global_batch // at_once),
        layout=layout,
        recompute=RECOMPUTE[training.layout.recompute],
        states=FP32,
        kernels=COMPILED if training.layout.compile else TRAINER,
        value_bytes=4 if training.dtype == "float32" else 2,
    )
    return adapted(run, training)


def plan_training(training: Training, *, pool: NodePool, instance: Instance) -> TrainingPlan:
    """Estimate a run on `training.nodes` nodes of `pool`. Raises ValueError for a layout that cannot be."""
    ranks = training.nodes * ranks_per_node(training, instance)
    tokens = training.steps * training.global_batch * training.seq
    checked = checked_layout(training, ranks=ranks)
    layout = describe(checked) if training.launches == 1 else f"{training.launches} launches of {describe(checked)}"
    if instance.gpu is None:
        speed = cpu.tokens_per_s(training, instance=instance)
        why = f"{instance.gflops_per_cpu:g} GFLOP/s reached on a CPU core (catalogue, measured with this trainer)"
        step_s = training.global_batch * training.seq / speed
        step = Estimate(value=step_s, unit="s", parts={"compute": step_s}, assumptions=(why,))
        peak, limit, mfu, hfu = cpu.memory(training), _pod_limit_gib(training, instance), None, None
        flops_per_s = None
    else:
        run, gpu = run_of(training, ranks=ranks), gpu_on(instance)
        flops_per_s = gpu.tflops_bf16 * 1e12 * (FP32_SPEED if training.dtype == "float32" else 1)
        step = _gpu_step(run, training=training, instance=instance)
        peak, limit = memory(run, statistic="device"), gpu.memory_gib
        flops = run.shape.flops_per_token(seq=training.seq) * run.tokens_per_step * training.launches
        mfu = flops / step.value / ranks / (gpu.tflops_bf16 * 1e12)
        hfu = mfu * hardware_flops_share(run)
    hours = training.steps * step.value / 3600
    why = step.assumptions if instance.gpu is None else (f"{step.value:.3g} s a step", *step.assumptions)
    return TrainingPlan(
        name=training.name,
        pool=pool.name,
        ranks=ranks,
        replicas=checked.dp * training.launches,
        layout=layout,
        parameters=Shape.of(training.shape, vocab_size=training.data.vocab_size).parameters,
        tokens=tokens,
        memory=peak,
        memory_limit_gib=limit,
        allocated_bytes=GIB * sum(gib for part, gib in peak.parts.items() if part not in NOT_TENSORS),
        peak_flops_per_rank=flops_per_s,
        step=step,
        hours=Estimate(value=hours, unit="h", assumptions=why),
        tokens_per_s=training.global_batch * training.seq / step.value,
        mfu=mfu,
        hfu=hfu,
        **_price(training, instance=instance, hours=hours, step_s=step.value),  # pyright: ignore[reportArgumentType]
    )


def memory_limit_gib(training: Training, *, instance: Instance) -> float:
    """What one rank may use, GiB."""
    return _pod_limit_gib(training, instance) if instance.gpu is None else gpu_on(instance).memory_gib


def _pod_limit_gib(training: Training, instance: Instance) -> float:
    pod = training.resources.memory_gib if training.resources else instance.allocatable_gib
    return pod / ranks_per_node(training, instance)


def _gpu_step(run: Run, *, training: Training, instance: Instance) -> Estimate:
    gpu = gpu_on(instance)
    if training.dtype == "float32":
        gpu = replace(gpu, tflops_bf16=gpu.tflops_bf16 * FP32_SPEED)
    step = step_time(run, gpu=gpu, node=instance.gpus)
    if training.launches == 1:
        return step
    meets = meeting_s(training, parameters=run.trained or run.shape.parameters, instance=instance)
    why = f"launches average over the node's {instance.network_gbps:g} Gb/s, from host to host (gloo)"
    parts = {**step.parts, "meetings": meets}
    return Estimate(value=step.value + meets, unit=step.unit, parts=parts, assumptions=(*step.assumptions, why))


def describe(layout: Layout) -> str:
    """`fsdp 8 · tp 2`: the dimensions above one."""
    sizes = (("dp", layout.dp), ("fsdp", layout.fsdp), ("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp))
    return " · ".join(f"{name} {size}" for name, size in sizes if size > 1) or "dp 1"


def _price(training: Training, *, instance: Instance, hours: float, step_s: float) -> dict[str, float | int | None]:
    """Fields of `TrainingPlan` about money and interruptions."""
    parameters = Shape.of(training.shape, vocab_size=training.data.vocab_size).parameters
    save, rate = save_s(parameters=parameters, nodes=training.nodes), instance.interruptions_per_h * training.nodes
    spot = interrupted(hours=hours, interval_s=training.checkpoint.every_steps * step_s, save=save, rate_per_h=rate)
    mean_s = 3600 / rate if rate else inf
    best_s = min(best_interval_s(save=save, mean_between_s=mean_s), hours * 3600)
    per_h = None if instance.price is None else instance.price * training.nodes
    on_demand = None if per_h is None else per_h * hours
    ends = isfinite(spot.hours)
    on_spot = per_h * instance.spot_share * spot.hours if per_h is not None and ends else None
    local = instance.cloud == "local"
    return {
        "usd": on_demand,
        "usd_spot": None if local else on_spot,
        "hours_spot": spot.hours if ends and not local else None,
        "interruptions": 0.0 if local else min(spot.interruptions, 1e9),
        "best_checkpoint_s": best_s,
        "best_checkpoint_steps": max(round(best_s / step_s), 1),
    }
