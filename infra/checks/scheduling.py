"""SLW3xx: what cannot be scheduled or divided as declared."""

from collections.abc import Iterator

from infra.catalog import instance
from infra.checks.finding import Finding
from infra.planner import Plan
from infra.planner.training import ranks_per_node
from infra.spec import Stack


def batch_divides(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW301: global_batch is micro_batch × ranks × a whole number of accumulation steps."""
    training = stack.training
    if training is None:
        return
    ranks = training.nodes * ranks_per_node(training, instance(stack.pool(training.pool).instance))
    once = training.micro_batch * ranks
    if training.global_batch % once:
        below, above = training.global_batch // once * once, -(-training.global_batch // once) * once
        yield Finding(
            code="SLW301",
            severity="error",
            where="training.global_batch",
            message=f"global_batch {training.global_batch} is no multiple of micro_batch {training.micro_batch} × {ranks} ranks = {once}",
            fix="global_batch: " + " or ".join(str(n) for n in (below, above) if n),
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
            yield Finding(
                code="SLW303",
                severity="error",
                where=f"node_pools.{pool.name}.instance",
                message=f"{machine.name} is an instance type of {machine.cloud}, and the platform is {stack.platform.cloud}",
                fix=f"an instance type of {stack.platform.cloud}",
            )
