"""What a service needs: memory of a replica, the tokens that its cache holds, latency under its traffic, the time to load."""

from dataclasses import dataclass, replace

from infra.catalog import Instance, models
from infra.planner.estimate import GIB, MARGIN, Estimate, total
from infra.planner.machine import gpu_on
from infra.planner.serve_memory import FORMATS, NON_TORCH_GIB, NON_TORCH_TP_GIB, Format, activation_bytes, weight_bytes
from infra.planner.serve_time import Server
from infra.planner.shape import Shape
from infra.planner.simulate import Latency, Load, Room, simulate
from infra.planner.train_memory import CONTEXT_GIB
from infra.spec import Service, Slo, Traffic, Training

# One measured cold start, split: engine start and bootstrap, and reading weights (a 5.6 GB image and package over the network).
START_S = 20
LOAD_GB_PER_S = 0.5
CPU_RUNTIME_GIB = 0.45
"""torch's own pages in a server on a CPU."""
STEP_TOKENS = 2048
"""Tokens of a server's largest step: it sizes activations, and prompts are prefilled in chunks of what decoding leaves of it."""
RARE_RPS = 0.001
"""Requests this rare meet no other: an SLO that they miss, no number of replicas meets."""
MOST_REPLICAS = 4096
"""Where a search for replicas gives up."""


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
    ttft_p50_s: float | None
    """Time to first token under `traffic` shared by the most replicas, simulated; None without traffic, or on a CPU."""
    ttft_p95_s: float | None
    tpot_p50_s: float | None
    """Time per output token after the first."""
    tpot_p95_s: float | None
    keeps_up: bool | None
    """The replicas serve the traffic without a growing queue."""
    usd_per_mtok: float | None
    """Price of a million output tokens at the traffic given; None when not known."""
    scale_up_s: int
    """From the moment that more load comes to one replica more that answers, where a node is there: scrape, decision, load."""


SCRAPE_S = 15
DECIDE_S = 15
"""The HPA's loop; with the scrape before it, what passes before a replica is asked for."""


def plan_service(service: Service, *, training: Training | None, instance: Instance) -> ServicePlan:
    """Estimate one service; `training` is the run that makes its model, where this stack has it."""
    shape = shape_of(service, training=training)
    kv_tokens, length, memory, latency, weights = None, service.max_model_len, None, None, 0.0
    if shape:
        memory = replica_memory(service, shape=shape, instance=instance)
        weights = memory.parts["weights"] * GIB
        width = value_bytes(service, on_gpu=instance.gpu is not None)
        kv_tokens = int(service.kv_gib * GIB // shape.kv_bytes_per_token(bytes_per_value=width))
        length = service.max_model_len or (training.shape.max_context if training else None)
        # A cache that holds no request has no latency: SLW203 says so.
        if service.traffic and instance.gpu and service.gpus and kv_tokens >= 2:
            latency = latency_of(
                service, traffic=service.traffic, shape=shape, instance=instance, replicas=service.most_replicas
            )
    usd = _usd_per_h(service, instance=instance)
    load_s = service.load_s or START_S + int(weights / (LOAD_GB_PER_S * 1e9))
    return ServicePlan(
        name=service.name,
        pool=service.pool,
        replicas=(service.least_replicas, service.most_replicas),
        memory=memory,
        memory_limit_gib=memory_limit_gib(service, instance=instance),
        kv_tokens=kv_tokens,
        max_model_len=length,
        concurrency=None if kv_tokens is None or length is None else kv_tokens / length,
        load_s=load_s,
        usd_per_h=usd,
        ttft_p50_s=latency.ttft_p50_s if latency else None,
        ttft_p95_s=latency.ttft_p95_s if latency else None,
        tpot_p50_s=latency.tpot_p50_s if latency else None,
        tpot_p95_s=latency.tpot_p95_s if latency else None,
        keeps_up=latency.keeps_up if latency else None,
        usd_per_mtok=_usd_per_mtok(usd[1], service.traffic) if usd and service.traffic else None,
        scale_up_s=SCRAPE_S + DECIDE_S + load_s,
    )


def shape_of(service: Service, *, training: Training | None) -> Shape | None:
    """Shape of the model that is served: of the stack's own training, or by its name in the catalogue; None when not known."""
    if training:
        return Shape.of(training.shape, vocab_size=training.data.vocab_size)
    known = models().get(service.model)
    return Shape.from_config(known) if known else None


def memory_limit_gib(service: Service, *, instance: Instance) -> float:
    """What one replica has, GiB: its GPUs' memory, or the container's where it has none."""
    on_gpu = instance.gpu and service.gpus
    return gpu_on(instance).memory_gib * service.gpus if on_gpu else service.resources.memory_gib


def replica_memory(service: Service, *, shape: Shape, instance: Instance) -> Estimate:
    """Memory of one replica over all its GPUs, GiB."""
    on_gpu = bool(instance.gpu and service.gpus)
    form = form_of(service, on_gpu=instance.gpu is not None)
    gpus = max(service.gpus, 1)
    parts = {"weights": gpus * weight_bytes(shape, form=form, tp=gpus) / GIB, "KV cache": service.kv_gib}
    if on_gpu:
        peak = activation_bytes(shape, tokens=STEP_TOKENS, sequences=service.max_num_seqs, tp=gpus)
        parts["activations"] = gpus * peak / GIB
        parts["runtime"] = gpus * (CONTEXT_GIB + (NON_TORCH_TP_GIB if gpus > 1 else NON_TORCH_GIB))
    else:
        parts["runtime"] = CPU_RUNTIME_GIB
        if service.spill_gib:
            parts["spilled prefixes"] = service.spill_gib
    return total("GiB", parts, "the KV cache is given in bytes and never grows", f"weights in {form.name}")


def form_of(service: Service, *, on_gpu: bool) -> Format:
    """What the layers' weights are stored in. Slipway's own server quantises them in groups of 32 with a 32-bit scale each."""
    plain = FORMATS["bf16" if value_bytes(service, on_gpu=on_gpu) == 2 else "fp32"]
    if service.quantize is None:
        return plain
    bits = {"int8": 8, "int4": 4}[service.quantize] + 32 / 32
    return Format(f"{service.quantize} and {plain.name}", bits, False, wide_bits=plain.wide_bits)


def with_cache(service: Service, *, share: float, shape: Shape, instance: Instance) -> Service:
    """The service with `share` of the memory that the checks let it fill, beside all else, as its cache."""
    parts = replica_memory(service, shape=shape, instance=instance).parts
    free = MARGIN * memory_limit_gib(service, instance=instance) - sum(parts.values()) + parts["KV cache"]
    gib = int(1000 * share * free) / 1000
    # Where the weights leave nothing SLW202 says so, whatever the cache.
    return service.model_copy(update={"kv_gib": gib}) if gib > 0 else service


def server_of(service: Service, *, shape: Shape, instance: Instance) -> tuple[Server, Room]:
    """A replica as the simulation sees it: tensor parallel over its GPUs."""
    width = value_bytes(service, on_gpu=True)
    server = Server(
        shape=shape,
        gpu=gpu_on(instance),
        form=FORMATS["bf16" if width == 2 else "fp32"],
        tp=service.gpus,
        kv_bytes=width,
        node=instance.gpus,
    )
    tokens = service.kv_gib * GIB / shape.kv_bytes_per_token(bytes_per_value=width)
    return server, Room(cache_tokens=tokens, sequences=service.max_num_seqs, batched_tokens=STEP_TOKENS)


def latency_of(service: Service, *, traffic: Traffic, shape: Shape, instance: Instance, replicas: int) -> Latency:
    """Latency when `replicas` share the traffic evenly."""
    server, room = server_of(service, shape=shape, instance=instance)
    return simulate(server, load=load_of(traffic, replicas=replicas), room=room)


def load_of(traffic: Traffic, *, replicas: int) -> Load:
    return Load(
        rps=traffic.rps / replicas,
        prompt_tokens=traffic.prompt_tokens,
        output_tokens=traffic.output_tokens,
        spread=traffic.spread,
    )


def meets(latency: Latency, slo: Slo) -> bool:
    """The replicas keep up, and the 95th percentiles are within what is asked."""
    tpot = slo.tpot_p95_s is None or latency.tpot_p95_s <= slo.tpot_p95_s
    return latency.keeps_up and latency.ttft_p95_s <= slo.ttft_p95_s and tpot


def replicas_for(server: Server, *, room: Room, traffic: Traffic, slo: Slo, at_least: int = 1) -> int | None:
    """The fewest replicas that meet `slo`; None when even one request at a time does not, or more than `MOST_REPLICAS` are needed."""

    def enough(replicas: int) -> bool:
        return meets(simulate(server, load=load_of(traffic, replicas=replicas), room=room), slo)

    alone = replace(load_of(traffic, replicas=1), rps=RARE_RPS)
    if not meets(simulate(server, load=alone, room=room), slo):
        return None
    high = max(at_least, 1)
    while not enough(high):
        high *= 2
        if high > MOST_REPLICAS:
            return None
    low = max(high // 2, at_least - 1)  # not enough, or below what is asked for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


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


def _usd_per_h(service: Service, *, instance: Instance) -> tuple[float, float] | None:
    per_node = replicas_per_node(service, instance=instance)
    if instance.price is None or not per_node:
        return None
    least, most = (-(-n // per_node) * instance.price for n in (service.least_replicas, service.most_replicas))
    return least, most


def _usd_per_mtok(usd_per_h: float, traffic: Traffic) -> float:
    return usd_per_h / (traffic.rps * traffic.output_tokens * 3600) * 1e6
