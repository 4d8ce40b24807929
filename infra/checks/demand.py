"""What training, services and batches ask of their pools, pod by pod: the arithmetic that the rules about room share."""

from collections import defaultdict
from dataclasses import dataclass
from math import ceil

from infra.catalog import Instance, instance
from infra.planner.training import ranks_per_node
from infra.spec import Batch, NodePool, Service, Stack, Training

LEAST_SHARE = 0.5
"""Share of a node that a training pod without `resources` takes at the very least; the components give it about three quarters."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Pods of one training, service or batch; the amounts are one pod's."""

    user: str
    """Key of the stack file: `training`, `services.chat`."""
    least: int
    """Pods that must run at once for the user to work at all."""
    most: int
    """Pods at full scale, with the surge of a roll-out."""
    gpus: int
    cpus: float
    memory_gib: float

    def nodes(self, pods: int, *, machine: Instance) -> int:
        """Nodes that `pods` fill by themselves. At least one pod fits a node; SLW104 refuses the others."""
        return ceil(pods / max(self.on_one_node(machine), 1))

    def on_one_node(self, machine: Instance) -> int:
        fits = [machine.allocatable_cpus // self.cpus, machine.allocatable_gib // self.memory_gib]
        return int(min([*fits, machine.gpus // self.gpus] if self.gpus else fits))


def batch_ranks(training: Training, machine: Instance) -> int:
    """Ranks that see different sequences: all but those that split a layer, a stage or a sequence."""
    inside = training.layout.tp * training.layout.pp * training.layout.cp
    return max(training.nodes * ranks_per_node(training, machine) // inside, 1)


def pools(stack: Stack) -> dict[str, tuple[NodePool, Instance]]:
    """Each pool and its instance type, by the pool's name."""
    return {pool.name: (pool, instance(pool.instance)) for pool in stack.node_pools}


def demands(stack: Stack) -> dict[str, list[Demand]]:
    """Who asks for what, by pool, in the order of the stack file."""
    found: dict[str, list[Demand]] = defaultdict(list)
    if stack.training:
        machine = instance(stack.pool(stack.training.pool).instance)
        found[stack.training.pool].append(_gang(stack.training, machine))
    for service in stack.services:
        found[service.pool].append(_replicas(service))
    for batch in stack.batches:
        found[batch.pool].append(_shards(batch))
    return found


def _gang(training: Training, machine: Instance) -> Demand:
    own = training.resources
    return Demand(
        user="training",
        least=training.nodes,
        most=training.nodes,
        gpus=ranks_per_node(training, machine) if machine.gpus else 0,
        cpus=own.cpus if own else LEAST_SHARE * machine.allocatable_cpus,
        memory_gib=own.memory_gib if own else LEAST_SHARE * machine.allocatable_gib,
    )


def _replicas(service: Service) -> Demand:
    return Demand(
        user=f"services.{service.name}",
        least=service.least_replicas,
        most=service.most_replicas + (1 if service.surge else 0),
        gpus=service.gpus,
        cpus=service.resources.cpus,
        memory_gib=service.resources.memory_gib,
    )


def _shards(batch: Batch) -> Demand:
    """One pod is enough for a batch to get on."""
    return Demand(
        user=f"batches.{batch.name}",
        least=1,
        most=batch.pods,
        gpus=batch.gpus,
        cpus=batch.resources.cpus,
        memory_gib=batch.resources.memory_gib,
    )
