"""The cheapest hardware that does a job: every instance of the catalogue, number of nodes and layout, against a deadline or an SLO."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from infra.catalog import Instance, instances
from infra.planner.estimate import GIB, MARGIN
from infra.planner.inference import STEP_TOKENS, meets, replicas_for
from infra.planner.layouts import best_layout
from infra.planner.machine import gpu_on
from infra.planner.serve_memory import Format, activation_bytes, cache
from infra.planner.serve_time import Server
from infra.planner.shape import Shape
from infra.planner.simulate import Load, Room, simulate
from infra.planner.spot import best_interval_s, interrupted, save_s
from infra.planner.training import describe
from infra.spec import Slo, Traffic

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of nodes that are tried."""
SHOWN = 4
"""The choice and the next best three."""
FASTEST_SHARE = 0.8
"""No run passes this share of a GPU's peak: what a candidate's least price is reckoned by before it is looked at."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to do the job."""

    instance: str
    gpu: str
    nodes: int
    gpus: int
    """GPUs that are used."""
    layout: str
    memory_gib: float
    """Of one GPU, at its peak."""
    memory_limit_gib: float
    usd_per_h: float
    numbers: dict[str, float]
    """What the job is measured by: hours, usd, mfu, usd_spot; or replicas, ttft_p95_s, tpot_p95_s, usd_per_mtok."""

    def cost(self, by: str) -> tuple[float, int, str]:
        return self.numbers[by], self.gpus, self.instance


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best first; empty when nothing does the job."""

    choices: tuple[Choice, ...]
    looked_at: int
    """Candidates whose time or latency was worked out; the others' least price was above the best four's."""
    why: str


def of_cloud(cloud: str | None) -> list[Instance]:
    """GPU instances with a price, of `cloud` or of all."""
    return [i for i in instances().values() if i.gpu and i.price is not None and cloud in (None, i.cloud)]


def cheapest_training(
    shape: Shape,
    *,
    tokens: float,
    deadline_h: float,
    seq: int,
    global_batch: int,
    among: Iterable[Instance],
    micro_batch: int | None = None,
    most_nodes: int = NODES[-1],
) -> Found:
    """The cheapest way to train on `tokens` tokens within `deadline_h` hours on demand, at the memory's margin."""
    flops = shape.flops_per_token(seq=seq) * tokens
    bounds = list[tuple[float, int, str, Instance]]()
    for machine in among:
        peak = gpu_on(machine).tflops_bf16 * 1e12 * FASTEST_SHARE * machine.gpus * 3600
        for nodes in (n for n in NODES if n <= most_nodes and flops / (peak * n) <= deadline_h):
            bounds.append((flops / peak * (machine.price or 0), nodes, machine.name, machine))
    fastest_h = inf

    def look(nodes: int, machine: Instance) -> Choice | None:
        nonlocal fastest_h
        fit = best_layout(
            shape, seq=seq, global_batch=global_batch, instance=machine, nodes=nodes, micro_batch=micro_batch
        )
        if fit is None:
            return None
        hours = tokens / fit.tokens_per_s / 3600
        fastest_h = min(fastest_h, hours)
        if hours > deadline_h:
            return None
        gpu, per_h = gpu_on(machine), (machine.price or 0) * nodes
        save, rate = save_s(parameters=shape.parameters, nodes=nodes), machine.interruptions_per_h * nodes
        every = best_interval_s(save=save, mean_between_s=3600 / rate)
        spot = interrupted(hours=hours, interval_s=every, save=save, rate_per_h=rate)
        return Choice(
            instance=machine.name,
            gpu=gpu.name,
            nodes=nodes,
            gpus=nodes * machine.gpus,
            layout=f"{describe(fit.run.layout)}, micro-batch {fit.run.micro_batch}"
            + ("" if fit.run.recompute == "none" else f", recompute {fit.run.recompute}"),
            memory_gib=fit.memory.value,
            memory_limit_gib=gpu.memory_gib,
            usd_per_h=per_h,
            numbers={
                "usd": per_h * hours,
                "hours": hours,
                "usd_spot": per_h * machine.spot_share * spot.hours,
                "hours_spot": spot.hours,
                "mfu": shape.flops_per_token(seq=seq)
                * fit.tokens_per_s
                / (nodes * machine.gpus * gpu.tflops_bf16 * 1e12),
                "tokens_per_s": fit.tokens_per_s,
                "best_checkpoint_s": every,
            },
        )

    choices, looked_at = _best(bounds, look, by="usd")
    reason = f"the cheapest within {deadline_h:g} h at {MARGIN:.0%} of the memory"
    if not choices:
        reason = (
            "no instance of the catalogue fits the model's memory"
            if fastest_h == inf
            else f"none is done within {deadline_h:g} h; the fastest takes {fastest_h:.1f} h"
        )
    return Found(choices=choices, looked_at=looked_at, why=reason)


def cheapest_serving(
    shape: Shape, *, traffic: Traffic, slo: Slo, among: Iterable[Instance], form: Format, sequences: int = 256
) -> Found:
    """The cheapest replicas that serve `traffic` within `slo`: tensor parallel inside a node, the cache in what is left of 90 %."""
    bounds = list[tuple[float, int, str, Instance]]()
    for machine in among:
        for tp in (t for t in (1, 2, 4, 8) if t <= machine.gpus and shape.heads % t == 0):
            prepared = _prepare(shape, machine=machine, tp=tp, form=form, traffic=traffic, sequences=sequences)
            if prepared is None:
                continue
            server, room = prepared
            most = server.saturated_tokens_per_s(
                prompt=traffic.prompt_tokens,
                output=traffic.output_tokens,
                cache_tokens=room.cache_tokens,
                most=sequences,
            )
            replicas = max(-(-traffic.rps * traffic.output_tokens // most), 1)
            nodes = -(-replicas * tp // (machine.gpus // tp * tp))
            bounds.append((nodes * (machine.price or 0) * 0.9, tp, machine.name, machine))

    def look(tp: int, machine: Instance) -> Choice | None:
        prepared = _prepare(shape, machine=machine, tp=tp, form=form, traffic=traffic, sequences=sequences)
        assert prepared is not None
        server, room = prepared
        replicas = replicas_for(server, room=room, traffic=traffic, slo=slo)
        if replicas is None:
            return None
        load = Load(
            rps=traffic.rps / replicas,
            prompt_tokens=traffic.prompt_tokens,
            output_tokens=traffic.output_tokens,
            spread=traffic.spread,
        )
        latency = simulate(server, load=load, room=room)
        assert meets(latency, slo)
        nodes = -(-replicas // (machine.gpus // tp))
        per_h = nodes * (machine.price or 0)
        limit = gpu_on(machine).memory_gib
        return Choice(
            instance=machine.name,
            gpu=server.gpu.name,
            nodes=nodes,
            gpus=replicas * tp,
            layout=f"{replicas} × tp {tp}",
            memory_gib=UTILIZATION * limit,
            memory_limit_gib=limit,
            usd_per_h=per_h,
            numbers={
                "usd": per_h,
                "replicas": float(replicas),
                "tp": float(tp),
                "ttft_p50_s": latency.ttft_p50_s,
                "ttft_p95_s": latency.ttft_p95_s,
                "tpot_p50_s": latency.tpot_p50_s,
                "tpot_p95_s": latency.tpot_p95_s,
                "kv_gib": room.cache_tokens * shape.kv_bytes_per_token(bytes_per_value=2) / GIB,
                "usd_per_mtok": per_h / (traffic.rps * traffic.output_tokens * 3600) * 1e6,
            },
        )

    choices, looked_at = _best(bounds, look, by="usd")
    why = f"the cheapest that serves {traffic.rps:g} requests/s with TTFT p95 ≤ {slo.ttft_p95_s:g} s" + (
        "" if slo.tpot_p95_s is None else f" and TPOT p95 ≤ {slo.tpot_p95_s:g} s"
    )
    if not choices:
        why = (
            "the model and one request fit no instance of the catalogue"
            if not bounds
            else "no instance of the catalogue meets that latency, even with one request at a time"
        )
    return Found(choices=choices, looked_at=looked_at, why=why)


UTILIZATION = 0.9
"""Share of a GPU's memory that a server is given (vLLM's default)."""


def _prepare(
    shape: Shape, *, machine: Instance, tp: int, form: Format, traffic: Traffic, sequences: int
) -> tuple[Server, Room] | None:
    """A replica on `tp` GPUs of `machine`; None where weights leave no room for a few requests."""
    gpu = gpu_on(machine)
    activations = activation_bytes(shape, tokens=STEP_TOKENS, sequences=sequences, tp=tp) / GIB
    kept = cache(
        shape, form=form, device_gib=gpu.memory_gib, utilization=UTILIZATION, tp=tp, activation_gib=activations
    )
    if kept.tokens < 4 * (traffic.prompt_tokens + traffic.output_tokens):
        return None
    server = Server(shape=shape, gpu=gpu, form=form, tp=tp, node=machine.gpus)
    return server, Room(cache_tokens=kept.tokens, sequences=sequences, batched_tokens=STEP_TOKENS)


def _best(
    bounds: list[tuple[float, int, str, Instance]], look: Callable[[int, Instance], Choice | None], *, by: str
) -> tuple[tuple[Choice, ...], int]:
    """The best `SHOWN` instances, one choice each: candidates in order of the least that they can cost, until that is above the
    last one kept. `bounds` holds (least price, size, name, instance)."""
    kept: dict[str, Choice] = {}
    looked_at = 0
    for least, size, name, machine in sorted(bounds, key=lambda bound: bound[:3]):
        ranked = sorted(choice.cost(by) for choice in kept.values())
        worst = ranked[SHOWN - 1][0] if len(ranked) >= SHOWN else inf
        if least > worst:
            break
        if name in kept and kept[name].cost(by)[0] < least:
            continue
        looked_at += 1
        choice = look(size, machine)
        if choice and (name not in kept or choice.cost(by) < kept[name].cost(by)):
            kept[name] = choice
    return tuple(sorted(kept.values(), key=lambda choice: choice.cost(by))[:SHOWN]), looked_at
