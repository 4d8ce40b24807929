"""SLW1xx: what one training or service asks for against what its pool can ever hold. What pools are shared for: `sharing`."""

from collections.abc import Iterator

from infra.catalog import Instance, instance, instances
from infra.checks.demand import Demand, demands, pools
from infra.checks.finding import Finding, Patch
from infra.planner import Plan
from infra.planner.training import ranks_per_node
from infra.spec import NodePool, Stack

DAEMONSETS_CPUS, DAEMONSETS_GIB = 0.4, 0.75
"""What CNI, kube-proxy, CSI, device plugin and exporters of a node may ask for together (an assumption, and so a warning only)."""


def gang_fits_pool(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW101: all pods of a training run must run at once; a pool that never has as many nodes leaves them Pending for ever."""
    training = stack.training
    if training is None:
        return
    pool = stack.pool(training.pool)
    if training.nodes > pool.max_nodes:
        most = pool.max_nodes // training.launches * training.launches
        gangs = "a gang of" if training.launches == 1 else f"{training.launches} launches with together"
        yield Finding(
            code="SLW101",
            severity="error",
            where="training.nodes",
            message=f"{gangs} {training.nodes} nodes, and pool {pool.name!r} can hold {pool.max_nodes}",
            fix=(f"nodes: {most}, or " if most else "") + f"max_nodes: {training.nodes} for the pool",
            patch={"training.nodes": most} if most else {f"node_pools.{pool.name}.max_nodes": training.nodes},
        )


def ranks_match_gpus(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW102: more ranks than GPUs cannot start; fewer leave paid GPUs idle."""
    training = stack.training
    if training is None:
        return
    machine = instance(stack.pool(training.pool).instance)
    ranks = ranks_per_node(training, machine)
    if machine.gpus and ranks != machine.gpus:
        too_many = ranks > machine.gpus
        yield Finding(
            code="SLW102",
            severity="error" if too_many else "warn",
            where="training.nproc_per_node",
            message=f"{ranks} ranks a node, and {machine.name} has {machine.gpus} GPUs"
            + ("" if too_many else "; the rest idle"),
            fix=f"nproc_per_node: {machine.gpus}, or leave it out",
            patch={"training.nproc_per_node": machine.gpus},
        )


def replicas_fit_pool(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW103: an autoscaler whose most replicas never fit its pool wedges; their surge is SLW505's."""
    of_pool, asked = pools(stack), _demand_of_services(stack)
    for service in stack.services:
        pool, machine = of_pool[service.pool]
        each = asked[service.name].on_one_node(machine)
        room = each * pool.max_nodes
        if each and service.most_replicas > room:
            wanted = asked[service.name].most
            needed = asked[service.name].nodes(wanted, machine=machine)
            most = max(room - (1 if service.surge else 0), 1)
            key = f"services.{service.name}.{'autoscaling.max_replicas' if service.autoscaling else 'replicas'}"
            yield Finding(
                code="SLW103",
                severity="error",
                where=key,
                message=f"{service.most_replicas} replicas{' and one of surge' if service.surge else ''} need {needed} "
                f"nodes, and pool {pool.name!r} can hold {pool.max_nodes} ({each} replicas a node)",
                fix=f"at most {most} replicas, or max_nodes: {needed} for the pool",
                patch={key: most}
                if not service.autoscaling or most >= service.least_replicas
                else {f"node_pools.{pool.name}.max_nodes": needed},
            )


def pod_fits_node(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW104: a pod that no node of its pool can hold is Pending for ever; one that leaves DaemonSets no room may be."""
    of_pool = pools(stack)
    for name, asked in demands(stack).items():
        pool, machine = of_pool[name]
        for demand in asked:
            if demand.user == "training" and demand.gpus > machine.gpus:
                continue  # SLW102 says it, in ranks
            if demand.on_one_node(machine) == 0:
                yield _too_large(demand, pool, machine, cloud=stack.platform.cloud)
            elif stack.platform.cloud != "local" and _crowds_daemonsets(demand, machine):
                yield Finding(
                    code="SLW104",
                    severity="warn",
                    where=f"{demand.user}.resources",
                    message=f"{demand.cpus:g} CPUs and {demand.memory_gib:g} GiB of {machine.allocatable_cpus:.1f} and "
                    f"{machine.allocatable_gib:.0f} that a {machine.name} node has to give leave DaemonSets no room "
                    f"(about {DAEMONSETS_CPUS:g} CPUs and {DAEMONSETS_GIB:g} GiB)",
                    fix="lower `resources` by that",
                    patch=_resources(demand, machine),
                )


def _too_large(demand: Demand, pool: NodePool, machine: Instance, *, cloud: str) -> Finding:
    what = "a training pod" if demand.user == "training" else "one replica"
    patch: Patch | None = None
    if demand.gpus <= machine.gpus:
        patch = _resources(demand, machine)
    elif larger := _holder(demand, machine, cloud=cloud):
        patch = {f"node_pools.{pool.name}.instance": larger.name}
    return Finding(
        code="SLW104",
        severity="error",
        where=f"{demand.user}.resources",
        message=f"{what} asks for {demand.gpus} GPUs, {demand.cpus:g} CPUs and {demand.memory_gib:g} GiB, "
        f"and a {machine.name} node has {machine.gpus}, {machine.allocatable_cpus:.1f} and "
        f"{machine.allocatable_gib:.0f} to give",
        fix="lower `gpus` or `resources`, or take a larger instance for the pool"
        + (", as your machines are: a TOML file that $SLIPWAY_CATALOG names says so" if cloud == "local" else ""),
        patch=patch,
    )


def _crowds_daemonsets(demand: Demand, machine: Instance) -> bool:
    return (
        demand.cpus > machine.allocatable_cpus - DAEMONSETS_CPUS
        or demand.memory_gib > machine.allocatable_gib - DAEMONSETS_GIB
    )


def _resources(demand: Demand, machine: Instance) -> Patch | None:
    """What a node has to give, in quarters of a CPU and whole GiB; None where so little is left that no pod would run."""
    cpus = int(4 * min(demand.cpus, machine.allocatable_cpus - DAEMONSETS_CPUS)) / 4
    memory_gib = int(min(demand.memory_gib, machine.allocatable_gib - DAEMONSETS_GIB))
    if cpus <= 0 or memory_gib <= 0:
        return None
    return {f"{demand.user}.resources.cpus": cpus, f"{demand.user}.resources.memory_gib": memory_gib}


def _holder(demand: Demand, machine: Instance, *, cloud: str) -> Instance | None:
    """The cheapest instance with the same GPU that holds the pod."""
    fits = [
        i
        for i in instances().values()
        if i.cloud == cloud and i.gpu == machine.gpu and i.price is not None and demand.on_one_node(i)
    ]
    return min(fits, key=lambda i: (i.price or 0, i.name), default=None)


def _demand_of_services(stack: Stack) -> dict[str, Demand]:
    found = demands(stack)
    return {demand.user.removeprefix("services."): demand for asked in found.values() for demand in asked}
