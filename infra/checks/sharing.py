"""SLW105, SLW106: what everything on a pool, and everything in the namespace, asks for together."""

from collections.abc import Iterator, Sequence
from math import ceil

from infra.catalog import Instance
from infra.checks.demand import Demand, demands, pools
from infra.checks.finding import Finding
from infra.planner import Plan
from infra.spec import Stack

HELPERS = 2
"""Pods that prepare data and promote."""
ROUTER_CPUS, ROUTER_GIB = 0.5, 0.5

UNITS = {"gpus": "GPUs", "cpus": "CPUs", "memory_gib": "GiB", "pods": "pods"}


def pool_holds_all(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW105: users of one pool that do not fit it together.

    A service that waits for its model holds the GPUs that the training which makes it waits for, for ever: an error. At full
    scale they only wait for one another: a warning. Counted is the least number of nodes that could do, so that nothing is
    refused which some packing would hold.
    """
    of_pool = pools(stack)
    for name, asked in demands(stack).items():
        pool, machine = of_pool[name]
        if len(asked) < 2 or any(demand.on_one_node(machine) == 0 for demand in asked):
            continue
        local = stack.platform.cloud == "local"
        least = _nodes_at_least([(demand, demand.least) for demand in asked], machine, gpus_only=local)
        most = _nodes_at_least([(demand, demand.most) for demand in asked], machine, gpus_only=local)
        if most <= pool.max_nodes:
            continue
        never = least > pool.max_nodes
        waits = (
            never and not local
        )  # processes of one machine share its GPUs, and a server may come when the training is over
        pods = [(demand, demand.least if never else demand.most) for demand in asked]
        enough = sum(demand.nodes(count, machine=machine) for demand, count in pods)
        yield Finding(
            code="SLW105",
            severity="error" if waits else "warn",
            where=f"node_pools.{name}.max_nodes",
            message=f"{_list(pods)} need {least if never else most} nodes {'' if never else 'at full scale '}together, "
            f"and pool {name!r} can hold {pool.max_nodes}",
            fix=f"max_nodes: {enough}, or pools of their own",
            patch={f"node_pools.{name}.max_nodes": enough},
        )


def quota_holds_all(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW106: a quota below what the stack asks for: the API server refuses the pods, and nothing in the stack says so."""
    asked = [demand for users in demands(stack).values() for demand in users]
    quota = stack.tenancy.quota
    routers = stack.router.replicas + 1 if stack.services else 0
    keepers = 0 if stack.platform.cloud == "local" else sum(pool.min_nodes for pool in stack.node_pools)
    meets = stack.training is not None and stack.training.meets
    others = routers + keepers + (HELPERS if stack.training else 0) + meets
    beside = {"gpus": 0.0, "cpus": routers * ROUTER_CPUS, "memory_gib": routers * ROUTER_GIB, "pods": others}
    limits = {"gpus": quota.gpus, "cpus": quota.cpus, "memory_gib": quota.memory_gib, "pods": quota.pods}
    for key, limit in limits.items():
        least = beside[key] + sum(demand.least * _amount(demand, key) for demand in asked)
        most = beside[key] + sum(demand.most * _amount(demand, key) for demand in asked)
        if limit is None or most <= limit:
            continue
        never = least > limit
        yield Finding(
            code="SLW106",
            severity="error" if never else "warn",
            where=f"tenancy.quota.{key}",
            message=f"the stack asks for {least if never else most:g} {UNITS[key]} "
            f"{'at the least' if never else 'at full scale'}, and the quota is {limit:g}",
            fix=f"{key}: {ceil(most)}",
            patch={f"tenancy.quota.{key}": ceil(most)},
        )


def _amount(demand: Demand, key: str) -> float:
    """What one pod takes of a quota."""
    return {"gpus": demand.gpus, "cpus": demand.cpus, "memory_gib": demand.memory_gib, "pods": 1}[key]


def _nodes_at_least(pods: Sequence[tuple[Demand, int]], machine: Instance, *, gpus_only: bool) -> int:
    """No packing needs fewer nodes. Of a local machine only GPUs are counted: its CPUs are shared by what does not run at once."""
    needs = [sum(demand.gpus * count for demand, count in pods) / machine.gpus] if machine.gpus else [0.0]
    if not gpus_only:
        needs.append(sum(demand.cpus * count for demand, count in pods) / machine.allocatable_cpus)
        needs.append(sum(demand.memory_gib * count for demand, count in pods) / machine.allocatable_gib)
    return ceil(max(needs) - 1e-9)


def _list(pods: Sequence[tuple[Demand, int]]) -> str:
    said = [f"{count} of {demand.user.removeprefix('services.')}" for demand, count in pods]
    shown = [*said[:3], f"{len(said) - 3} more"] if len(said) > 4 else said
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
