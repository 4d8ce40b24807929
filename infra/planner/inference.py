"""What a service needs: memory of a replica, the tokens that its cache holds, the time to load."""

from dataclasses import dataclass

from infra.catalog import Instance, gpu
from infra.planner.estimate import GIB, Estimate, total
from infra.planner.shape import Shape
from infra.spec import Service, Training

# One measured cold start, split: engine start and bootstrap, and reading weights (a 5.6 GB image and package over the network).
START_S = 20
LOAD_GB_PER_S = 0.5
RUNTIME_GIB = {"gpu": 1.5, "cpu": 0.45}


@dataclass(frozen=True, kw_only=True)
class ServicePlan:
    name: str
    pool: str
    replicas: tuple[int, int]
    """Least and most."""
    memory: Estimate | None
    """One replica's, GiB; None when the stack does not say the model's shape."""
    memory_limit_gib: float
    kv_tokens: int | None
    """Tokens that the KV cache holds."""
    max_model_len: int | None
    concurrency: float | None
    """Sequences of the full context that the cache holds at once."""
    load_s: int
    """Time until a replica can answer, seconds, once its pod has started."""
    usd_per_h: tuple[float, float] | None
    """Price of the nodes that the replicas fill, least and most; None when not known."""


def plan_service(service: Service, *, training: Training | None, instance: Instance) -> ServicePlan:
    """Estimate one service; `training` is the run that makes its model, where this stack has it."""
    limit = (
        gpu(instance.gpu).memory_gib * service.gpus if instance.gpu and service.gpus else service.resources.memory_gib
    )
    per_node = replicas_per_node(service, instance=instance)
    nodes = tuple(-(-n // per_node) for n in (service.least_replicas, service.most_replicas)) if per_node else None
    usd = None if instance.price is None or nodes is None else (nodes[0] * instance.price, nodes[1] * instance.price)
    weights, kv_tokens, length = None, None, service.max_model_len
    if training:
        width = value_bytes(service, on_gpu=instance.gpu is not None)
        shape = Shape.of(training.model, vocab_size=training.data.vocab_size)
        weights = shape.parameters * width
        kv_tokens = int(service.kv_gib * GIB // shape.kv_bytes_per_token(bytes_per_value=width))
        length = service.max_model_len or training.model.max_context
    return ServicePlan(
        name=service.name,
        pool=service.pool,
        replicas=(service.least_replicas, service.most_replicas),
        memory=None
        if weights is None
        else total(
            "GiB",
            {
                "weights": weights / GIB,
                "KV cache": service.kv_gib,
                "runtime": RUNTIME_GIB["gpu" if service.gpus else "cpu"],
            },
            "the KV cache is given in bytes and never grows",
        ),
        memory_limit_gib=limit,
        kv_tokens=kv_tokens,
        max_model_len=length,
        concurrency=None if kv_tokens is None or length is None else kv_tokens / length,
        load_s=service.load_s or START_S + int((weights or 0) / (LOAD_GB_PER_S * 1e9)),
        usd_per_h=usd,
    )


def value_bytes(service: Service, *, on_gpu: bool) -> int:
    """Bytes of a weight and of a cached value: `auto` is bfloat16 on a GPU and float32 on a CPU."""
    return 2 if service.dtype == "bfloat16" or (service.dtype == "auto" and on_gpu) else 4


def replicas_per_node(service: Service, *, instance: Instance) -> int:
    """Replicas of `service` that one node holds, by GPUs, CPUs and memory; 0 when not even one fits."""
    fits = [
        instance.allocatable_cpus // service.resources.cpus,
        instance.allocatable_gib // service.resources.memory_gib,
    ]
    if service.gpus:
        fits.append(instance.gpus // service.gpus)
    return int(min(fits))
