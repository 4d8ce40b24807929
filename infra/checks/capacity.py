"""SLW1xx: what is asked for against what the pools can ever hold."""

from collections.abc import Iterator

from infra.catalog import instance
from infra.checks.finding import Finding
from infra.planner import Plan
from infra.planner.inference import replicas_per_node
from infra.planner.training import ranks_per_node
from infra.spec import Stack


def gang_fits_pool(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW101: all pods of a training run must run at once; a pool that never has as many nodes leaves them Pending for ever."""
    training = stack.training
    if training is None:
        return
    pool = stack.pool(training.pool)
    if training.nodes > pool.max_nodes:
        yield Finding(
            code="SLW101",
            severity="error",
            where="training.nodes",
            message=f"a gang of {training.nodes} nodes, and pool {pool.name!r} can hold {pool.max_nodes}",
            fix=f"nodes: {pool.max_nodes}, or max_nodes: {training.nodes} for the pool",
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
        )


def replicas_fit_pool(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW103: an autoscaler whose most replicas (and the surge of a roll-out) never fit its pool wedges."""
    for service in stack.services:
        pool = stack.pool(service.pool)
        machine = instance(pool.instance)
        each = replicas_per_node(service, instance=machine)
        where = f"services.{service.name}"
        if each == 0:
            yield Finding(
                code="SLW104",
                severity="error",
                where=f"{where}.resources",
                message=f"one replica asks for {service.gpus} GPUs, {service.resources.cpus:g} CPUs and "
                f"{service.resources.memory_gib:g} GiB, and a {machine.name} node has {machine.gpus}, "
                f"{machine.allocatable_cpus:.1f} and {machine.allocatable_gib:.0f} to give",
                fix="lower `gpus` or `resources`, or take a larger instance for the pool",
            )
            continue
        wanted = service.most_replicas + (1 if service.surge else 0)
        room = each * pool.max_nodes
        if wanted > room:
            yield Finding(
                code="SLW103",
                severity="error",
                where=f"{where}.{'autoscaling.max_replicas' if service.autoscaling else 'replicas'}",
                message=f"{service.most_replicas} replicas{' and one of surge' if service.surge else ''} need {-(-wanted // each)} "
                f"nodes, and pool {pool.name!r} can hold {pool.max_nodes} ({each} replicas a node)",
                fix=f"at most {max(room - (1 if service.surge else 0), 1)} replicas, or max_nodes: {-(-wanted // each)} for the pool",
            )
