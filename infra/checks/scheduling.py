"""SLW3xx: what cannot be scheduled or divided as declared, and names that lead nowhere."""

from collections.abc import Iterator
from difflib import get_close_matches

from infra.catalog import instance, instances
from infra.checks.demand import batch_ranks, pools
from infra.checks.finding import Finding, Patch
from infra.planner import Plan
from infra.planner.trainable import obstacle
from infra.planner.training import checked_layout, ranks_per_node
from infra.spec import NodePool, Stack, Training


def batch_divides(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW301: global_batch is micro_batch × (data-parallel) ranks × a whole number of accumulation steps."""
    training = stack.training
    if training is None:
        return
    ranks = batch_ranks(training, instance(stack.pool(training.pool).instance))
    once = training.micro_batch * ranks
    if training.global_batch % once:
        below, above = training.global_batch // once * once, -(-training.global_batch // once) * once
        yield Finding(
            code="SLW301",
            severity="error",
            where="training.global_batch",
            message=f"global_batch {training.global_batch} is no multiple of micro_batch {training.micro_batch} × {ranks} ranks = {once}",
            fix="global_batch: " + " or ".join(str(n) for n in (below, above) if n),
            patch=_division(training, ranks=ranks, nearest=(below, above)),
        )


def volumes_are_shared(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW302: pods on several nodes cannot share a ReadWriteOnce volume (all on one node can)."""
    several = any(pool.max_nodes > 1 for pool in stack.node_pools) or len(stack.node_pools) > 1
    if several and not stack.storage.shared and stack.platform.cloud != "local":
        yield Finding(
            code="SLW302",
            severity="error",
            where="storage.shared",
            message="pods of several nodes use the volumes `data` and `runs`, and the storage class gives ReadWriteOnce",
            fix="shared: true, with a class_name that gives ReadWriteMany (EFS, Filestore, Azure Files)",
        )


def clouds_agree(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW303: an instance type of one cloud cannot be had in another."""
    for pool in stack.node_pools:
        machine = instance(pool.instance)
        if machine.cloud not in (stack.platform.cloud, "local") and stack.platform.cloud != "local":
            twins = [
                other
                for other in instances().values()
                if (other.cloud, other.gpu, other.gpus) == (stack.platform.cloud, machine.gpu, machine.gpus)
            ]
            twin = min(twins, key=lambda i: (i.price is None, i.price or 0, i.name), default=None)
            yield Finding(
                code="SLW303",
                severity="error",
                where=f"node_pools.{pool.name}.instance",
                message=f"{machine.name} is an instance type of {machine.cloud}, and the platform is {stack.platform.cloud}",
                fix=f"instance: {twin.name}" if twin else f"an instance type of {stack.platform.cloud}",
                patch={f"node_pools.{pool.name}.instance": twin.name} if twin else None,
            )


def services_have_a_model(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW304: a service that follows a channel which nothing in the stack fills waits unready for ever. By hand it can be filled."""
    training = stack.training
    if training is None:
        return
    for service in stack.services:
        near = get_close_matches(service.model, [training.name], cutoff=0.8)
        if service.model == training.name and service.channel != training.channel:
            yield Finding(
                code="SLW304",
                severity="warn",
                where=f"services.{service.name}.channel",
                message=f"follows channel {service.channel!r}, and the training moves {training.channel!r}: "
                "the service waits until someone promotes by hand",
                fix=f"channel: {training.channel}",
                patch={f"services.{service.name}.channel": training.channel},
            )
        elif near and service.model != training.name:
            yield Finding(
                code="SLW304",
                severity="warn",
                where=f"services.{service.name}.model",
                message=f"serves {service.model!r}, and the training makes {training.name!r}",
                fix=f"model: {training.name}",
                patch={f"services.{service.name}.model": training.name},
            )


def capacity_can_be_ordered(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW305: Karpenter takes spot first wherever it may, so an order that begins with on-demand cannot be kept."""
    for pool in stack.node_pools:
        if stack.platform.cloud == "aws" and pool.capacity[0] == "on-demand" and "spot" in pool.capacity:
            yield Finding(
                code="SLW305",
                severity="error",
                where=f"node_pools.{pool.name}.capacity",
                message="on-demand before spot, and Karpenter takes spot first wherever it may",
                fix="[spot, on-demand], or [on-demand] alone",
                patch={f"node_pools.{pool.name}.capacity": ("spot", "on-demand")},
            )


def gpus_are_asked_for(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW306: a replica without a GPU on a node that has some computes on CPUs, and pays for the GPUs."""
    of_pool = pools(stack)
    for service in stack.services:
        pool, machine = of_pool[service.pool]
        if machine.gpus and not service.gpus:
            yield Finding(
                code="SLW306",
                severity="warn",
                where=f"services.{service.name}.gpus",
                message=f"asks for no GPU on pool {pool.name!r}, whose {machine.name} nodes have {_gpus(machine.gpus, pool)}",
                fix="gpus: 1, or a pool without GPUs",
                patch={f"services.{service.name}.gpus": 1},
            )


def layout_can_be_trained(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW307: a layout that the trainer refuses when it starts, which is when the GPUs are there."""
    training = stack.training
    if training is None:
        return
    machine = instance(stack.pool(training.pool).instance)
    layout = checked_layout(training, ranks=training.nodes * ranks_per_node(training, machine))
    if reason := obstacle(layout, training):
        yield Finding(
            code="SLW307",
            severity="error",
            where="training.local_sgd" if reason.startswith("local_sgd") else "training.parallelism",
            message=reason,
            fix="another factor, more ranks, or the value that it is held against",
        )


def classifiers_are_not_served(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW308: the server answers with text, and a classifier has none: its replicas never get ready."""
    for service in stack.services:
        made_by = stack.trains(service)
        if made_by and made_by.data.task.kind == "classify":
            yield Finding(
                code="SLW308",
                severity="error",
                where=f"services.{service.name}.model",
                message=f"{service.model!r} is a classifier, and the server answers with text",
                fix="leave the service out; the package opens in Transformers, and trainer.onnx makes an ONNX graph of it",
            )


def runtime_class_has_gpus(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW310: a RuntimeClass for GPUs on machines that have none: its handler is missing there, and no container starts."""
    for pool in stack.node_pools:
        if pool.runtime_class and not instance(pool.instance).gpus:
            yield Finding(
                code="SLW310",
                severity="error",
                where=f"node_pools.{pool.name}.runtime_class",
                message=f"pods of pool {pool.name!r} ask for runtime class {pool.runtime_class!r}, and {pool.instance} has no GPU",
                fix="leave runtime_class out",
                patch={f"node_pools.{pool.name}.runtime_class": None},
            )


def _division(training: Training, *, ranks: int, nearest: tuple[int, int]) -> Patch:
    """A smaller micro_batch where that divides, since it changes nothing that is learnt; else the nearest global_batch."""
    each, rest = divmod(training.global_batch, ranks)
    if rest == 0:
        return {"training.micro_batch": max(n for n in range(1, min(training.micro_batch, 4096) + 1) if each % n == 0)}
    below, above = nearest
    closer = above if not below or above - training.global_batch <= training.global_batch - below else below
    return {"training.global_batch": closer}


def _gpus(count: int, pool: NodePool) -> str:
    return f"{count} GPU{'s' if count > 1 else ''} each (at most {pool.max_nodes} nodes)"
