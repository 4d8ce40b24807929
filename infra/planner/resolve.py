"""What a stack leaves to the planner (`auto`), chosen: from a stack to the same stack with plain values, and the reasons.

The one place between spec and plan where this happens; a stack that leaves nothing open passes as it is. A choice is the cheapest
that the checks would let pass: it fits the memory with their margin, and meets the deadline or the SLO.
"""

from dataclasses import dataclass

from infra.catalog import Instance, instance
from infra.planner.adapters import adapted
from infra.planner.base import with_shape
from infra.planner.estimate import MARGIN
from infra.planner.inference import (
    MOST_REPLICAS,
    plan_service,
    replicas_for,
    replicas_per_node,
    server_of,
    shape_of,
    with_cache,
)
from infra.planner.layouts import best_layout
from infra.planner.search import SHOWN, of_cloud
from infra.planner.shape import Shape
from infra.planner.trainable import obstacle
from infra.planner.training import describe, plan_training, ranks_per_node
from infra.spec import NodePool, Parallelism, Service, Stack, Training, Unplannable

STACK_RECOMPUTE = {"none": "none", "matmul": "selective", "full": "full"}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A value that the planner filled in."""

    where: str
    """Key of the stack file."""
    value: str
    why: str
    others: tuple[str, ...] = ()
    """The next best, and what they would cost."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    stack: Stack
    chosen: tuple[Chosen, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Option:
    """An instance that does all that a pool is for."""

    instance: str
    usd: float
    says: str


def resolve(stack: Stack) -> Resolved:
    """The stack with every `auto` replaced. Raises `Unplannable` where nothing does, or something is missing."""
    chosen = list[Chosen]()
    if stack.training and stack.training.base and not stack.training.model:
        stack = stack.model_copy(update={"training": with_shape(stack.training)})
        chosen.append(_of_base(stack))
    for pool in [pool for pool in stack.node_pools if pool.instance == "auto"]:
        stack, choice = _choose_instance(stack, pool)
        chosen.append(choice)
    if stack.training and stack.training.parallelism == "auto":
        training, choice = _choose_layout(stack.training, machine=instance(stack.pool(stack.training.pool).instance))
        stack = stack.model_copy(update={"training": training})
        chosen.append(choice)
    services = list[Service]()
    for service in stack.services:
        if service.kv_share is not None:
            service, choice = _size_cache(service, stack=stack, pool=stack.pool(service.pool))
            chosen.append(choice)
        if service.replicas == "auto":
            service, choice = _choose_replicas(service, stack=stack, pool=stack.pool(service.pool))
            chosen.append(choice)
        services.append(service)
    if chosen:
        stack = stack.model_copy(update={"services": tuple(services)})
    return Resolved(stack=stack, chosen=tuple(chosen))


def _of_base(stack: Stack) -> Chosen:
    training = stack.training
    assert training is not None
    assert training.base is not None
    shape = Shape.of(training.shape, vocab_size=training.data.vocab_size)
    says = f"{shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab:,}"
    return Chosen(where="training.model", value=says, why=f"the shape of {training.base.shape or training.base.path}")


def _choose_instance(stack: Stack, pool: NodePool) -> tuple[Stack, Chosen]:
    where = f"node_pools.{pool.name}.instance"
    trains = stack.training if stack.training and stack.training.pool == pool.name else None
    serves = [service for service in stack.services if service.pool == pool.name]
    if trains and trains.deadline_h is None:
        raise Unplannable(where, "auto trains within a deadline, and there is none; set training.deadline_h")
    if not trains and not serves:
        raise Unplannable(where, "auto, and nothing uses the pool; name an instance type")
    if any(not service.gpus for service in serves):
        raise Unplannable(
            where, "auto chooses among GPU instances, and a service of the pool asks for no GPU; name a type"
        )
    cloud = None if stack.platform.cloud == "local" else stack.platform.cloud
    options = sorted(
        (option for machine in of_cloud(cloud) if (option := _option(stack, pool, machine, trains, serves))),
        key=lambda option: (option.usd, option.instance),
    )
    if not options:
        raise Unplannable(
            where,
            f"no instance type of {cloud or 'the catalogue'} does it; "
            + ("raise training.deadline_h or training.nodes, " if trains else "raise max_nodes or slo, ")
            + "or name a type to see what is short",
        )
    best = options[0]
    pools = tuple(p.model_copy(update={"instance": best.instance}) if p is pool else p for p in stack.node_pools)
    return stack.model_copy(update={"node_pools": pools}), Chosen(
        where=where,
        value=best.instance,
        why=f"the cheapest of {len(options)} that fit: {best.says}",
        others=tuple(f"{option.instance}: {option.says}" for option in options[1:SHOWN]),
    )


def _option(
    stack: Stack, pool: NodePool, machine: Instance, trains: Training | None, serves: list[Service]
) -> _Option | None:
    """What the pool would cost with `machine`; None where it does not do."""
    if stack.budget.usd_per_h is not None and _at_most(stack, pool, machine) > stack.budget.usd_per_h:
        return None
    as_pool, usd, says = pool.model_copy(update={"instance": machine.name}), 0.0, list[str]()
    if trains:
        try:
            trains = trains if trains.parallelism != "auto" else _choose_layout(trains, machine=machine)[0]
            run = plan_training(trains, pool=as_pool, instance=machine)
        except ValueError:  # a layout that these GPUs cannot have
            return None
        if run.memory.value > MARGIN * run.memory_limit_gib or run.hours.value > (trains.deadline_h or 0):
            return None
        if ranks_per_node(trains, machine) > machine.gpus or not _divides(trains, ranks=run.ranks):
            return None
        if stack.budget.usd_per_run is not None and (run.usd or 0) > stack.budget.usd_per_run:
            return None
        usd += run.usd or 0
        says.append(f"{run.hours.value:.1f} h, {run.usd or 0:,.0f} USD a run")
    for service in serves:
        fits = _serves(service, stack=stack, pool=as_pool, machine=machine)
        if fits is None:
            return None
        usd += fits
        says.append(f"{service.name} for {fits:,.2f} USD/h")
    return _Option(instance=machine.name, usd=usd, says=", ".join(says))


def _at_most(stack: Stack, pool: NodePool, machine: Instance) -> float:
    """USD an hour of the pool on `machine` and of the pools whose type is known, at their fullest."""
    others = [p for p in stack.node_pools if p.name != pool.name and p.instance != "auto"]
    return pool.max_nodes * (machine.price or 0) + sum(p.max_nodes * (instance(p.instance).price or 0) for p in others)


def _divides(training: Training, *, ranks: int) -> bool:
    """The global batch is whole micro-batches on every replica."""
    layout = training.layout
    return training.global_batch % (training.micro_batch * ranks // (layout.tp * layout.pp * layout.cp)) == 0


def _serves(service: Service, *, stack: Stack, pool: NodePool, machine: Instance) -> float | None:
    """USD an hour of the service at its most replicas on nodes of `machine`; None where it does not fit or meet its SLO."""
    if service.gpus > machine.gpus or not replicas_per_node(service, instance=machine):
        return None
    if service.kv_share is not None:
        service = _size_cache(service, stack=stack, pool=pool)[0]
    if service.replicas == "auto":
        try:
            service = _choose_replicas(service, stack=stack, pool=pool)[0]
        except ValueError:
            return None
    each = replicas_per_node(service, instance=machine)
    planned = plan_service(service, training=stack.trains(service), instance=machine)
    over = planned.memory is not None and planned.memory.value > MARGIN * planned.memory_limit_gib
    slow = service.traffic is not None and (
        not planned.keeps_up
        or (planned.ttft_p95_s or 0) > service.slo.ttft_p95_s
        or (planned.tpot_p95_s or 0) > (service.slo.tpot_p95_s or float("inf"))
    )
    too_many = service.most_replicas + service.surge > each * pool.max_nodes
    return None if over or slow or too_many or planned.usd_per_h is None else planned.usd_per_h[1]


def _choose_layout(training: Training, *, machine: Instance) -> tuple[Training, Chosen]:
    where = "training.parallelism"
    if machine.gpu is None:
        layout = Parallelism()
        says = "on CPUs every rank has the whole model"
    else:
        if training.nproc_per_node not in (None, machine.gpus):
            raise Unplannable(where, f"auto uses all {machine.gpus} GPUs of a node; leave nproc_per_node out")
        fit = best_layout(
            Shape.of(training.shape, vocab_size=training.data.vocab_size),
            seq=training.seq,
            global_batch=training.global_batch // training.launches,
            instance=machine,
            nodes=training.nodes_of_launch,
            micro_batch=training.micro_batch,
            allows=lambda layout: obstacle(layout, training) is None,
            adapt=lambda run: adapted(run, training),
        )
        if fit is None:
            raise Unplannable(
                where,
                f"no layout of {training.nodes} × {machine.name} fits micro_batch {training.micro_batch} and "
                f"global_batch {training.global_batch}; lower micro_batch, or more nodes or memory",
            )
        found = fit.run.layout
        layout = Parallelism.model_validate(
            {"fsdp": found.fsdp, "tp": found.tp, "pp": found.pp, "cp": found.cp}
            | {"recompute": STACK_RECOMPUTE[fit.run.recompute]}
        )
        says = (
            f"the fastest that fits: {fit.step_s:.3g} s a step, {fit.memory.value:.0f} GiB a rank "
            f"({describe(found)}, recompute {layout.recompute})"
        )
    value = ", ".join(f"{name}: {size}" for name, size in layout.model_dump().items() if size not in (1, "none"))
    chosen = Chosen(where=where, value=f"{{{value}}}", why=says)
    return training.model_copy(update={"parallelism": layout}), chosen


def _size_cache(service: Service, *, stack: Stack, pool: NodePool) -> tuple[Service, Chosen]:
    where, share = f"services.{service.name}.kv_share", service.kv_share
    assert share is not None
    shape = shape_of(service, training=stack.trains(service))
    if shape is None:
        raise Unplannable(where, "a share needs a model of this stack or of the catalogue; give kv_gib")
    service = with_cache(service, share=share, shape=shape, instance=instance(pool.instance))
    why = f"{share:.0%} of what weights and computing leave of a replica's memory"
    return service, Chosen(where=f"services.{service.name}.kv_gib", value=f"{service.kv_gib:g}", why=why)


def _choose_replicas(service: Service, *, stack: Stack, pool: NodePool) -> tuple[Service, Chosen]:
    where = f"services.{service.name}.replicas"
    if service.autoscaling:
        raise Unplannable(where, "auto, and autoscaling decides; leave replicas out")
    machine, shape = instance(pool.instance), shape_of(service, training=stack.trains(service))
    missing = [
        what
        for what, there in (
            ("`traffic` on the service", service.traffic),
            ("a GPU", machine.gpu and service.gpus),
            ("a model of this stack or of the catalogue", shape),
        )
        if not there
    ]
    if missing or service.traffic is None or shape is None:
        raise Unplannable(where, f"auto needs {' and '.join(missing)}; or give a number")
    server, room = server_of(service, shape=shape, instance=machine)
    number = replicas_for(server, room=room, traffic=service.traffic, slo=service.slo)
    if number is None:
        raise Unplannable(
            where,
            f"no number of replicas up to {MOST_REPLICAS} on {machine.name} answers within {service.slo.ttft_p95_s:g} s; "
            "raise slo, or take a faster instance",
        )
    chosen = Chosen(
        where=where,
        value=str(number),
        why=f"the fewest that serve {service.traffic.rps:g} requests/s within TTFT p95 {service.slo.ttft_p95_s:g} s, simulated",
    )
    return service.model_copy(update={"replicas": number}), chosen
