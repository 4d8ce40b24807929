"""The fastest way to spread a training run over the GPUs of an instance that fits their memory with a margin."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from infra.catalog import Instance
from infra.planner.estimate import MARGIN, Estimate
from infra.planner.machine import gpu_on
from infra.planner.run import FP32, Layout, Recompute, Run, check_layout
from infra.planner.shape import Shape
from infra.planner.train_memory import memory
from infra.planner.train_time import step_time
from infra.planner.training import TRAINER

RECOMPUTE: tuple[Recompute, ...] = ("none", "matmul", "full")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A run that fits, with what it needs."""

    run: Run
    memory: Estimate
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.run.tokens_per_step / self.step_s


def best_layout(
    shape: Shape,
    *,
    seq: int,
    global_batch: int,
    instance: Instance,
    nodes: int,
    micro_batch: int | None = None,
    allows: Callable[[Layout], bool] = lambda _: True,
    adapt: Callable[[Run], Run] = lambda run: run,
) -> Fit | None:
    """The fastest run on `nodes` nodes among layouts that `allows` lets pass; None when none fits. `micro_batch` None: chosen
    too. `adapt` says of a run what is not trained.

    Raises ValueError for an instance without a GPU.
    """
    best: Fit | None = None
    gpu = gpu_on(instance)
    for layout in candidates(shape, seq=seq, instance=instance, nodes=nodes):
        if not allows(layout):
            continue
        for recompute in RECOMPUTE:
            template = Run(
                shape=shape,
                seq=seq,
                micro_batch=1,
                micro_batches=1,
                layout=layout,
                recompute=recompute,
                states=FP32,
                kernels=TRAINER,
            )
            room_gib = MARGIN * gpu.memory_gib
            run = _largest(adapt(template), global_batch=global_batch, micro_batch=micro_batch, room_gib=room_gib)
            if run is None:
                continue
            step_s = step_time(run, gpu=gpu, node=instance.gpus).value
            if best is None or step_s < best.step_s * 0.999:
                best = Fit(run=run, memory=memory(run, statistic="device"), step_s=step_s)
            break  # what recomputes less fits and is the faster of the two
    return best


def candidates(shape: Shape, *, seq: int, instance: Instance, nodes: int) -> Iterator[Layout]:
    """Layouts worth trying, the plainest first: replicas, sharded replicas, then tensor, context and pipeline parallel."""
    gpus = instance.gpus * nodes
    for pp in (p for p in (1, 2, 4, 8, 16) if p <= min(nodes, shape.layers) and shape.layers % p == 0):
        for cp in (c for c in (1, 2, 4, 8) if c == 1 or seq // c >= 8192):
            for tp in (t for t in (1, 2, 4, 8) if t <= instance.gpus and shape.heads % t == 0):
                if gpus % (pp * cp * tp):
                    continue
                replicas = gpus // (pp * cp * tp)
                whole = {1, replicas} if pp == 1 else {1}
                inside = instance.gpus // (tp * cp) if pp == 1 and instance.gpus % (tp * cp) == 0 else 1
                for fsdp in sorted(whole | ({inside} if replicas % max(inside, 1) == 0 else set())):
                    layout = Layout(dp=replicas // fsdp, fsdp=fsdp, tp=tp, pp=pp, cp=cp, zero=3 if fsdp > 1 else 0)
                    try:
                        check_layout(shape, layout)
                    except ValueError:
                        continue
                    yield layout


def _largest(template: Run, *, global_batch: int, micro_batch: int | None, room_gib: float) -> Run | None:
    """The run with the largest micro-batch that fits (a power of two times), or the one given; None when none does."""
    layout = template.layout
    if global_batch % layout.batch_ranks:
        return None
    local, found = global_batch // layout.batch_ranks, None
    sizes = [micro_batch] if micro_batch else [2**n for n in range(6)]
    for size in sizes:
        if local % size:
            break
        run = replace(template, micro_batch=size, micro_batches=local // size)
        if memory(run, statistic="device").value > room_gib:
            break
        if layout.pp > 1 and found and run.micro_batches < 4 * layout.pp:
            break
        found = run
    return found
