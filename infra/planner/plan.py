"""The plan of a stack: what will run, whether it fits, how long, how much."""

from dataclasses import asdict, dataclass
from typing import Any

from infra.catalog import instance
from infra.planner.inference import ServicePlan, plan_service
from infra.planner.resolve import Chosen, resolve
from infra.planner.training import TrainingPlan, plan_training
from infra.spec import NodePool, Stack, Unplannable

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    name: str
    instance: str
    gpu: str | None
    nodes: tuple[int, int]
    """Least and most."""
    gpus: int
    """GPUs at most."""
    usd_per_h: tuple[float, float] | None
    """Price of the least and of the most nodes, on demand; None when not known."""
    price: str
    """Source and date of the price."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    stack: Stack
    """The stack that was planned, with plain values where it says `auto`."""
    chosen: tuple[Chosen, ...]
    """What `auto` became, and why."""
    pools: tuple[PoolPlan, ...]
    training: TrainingPlan | None
    services: tuple[ServicePlan, ...]

    @property
    def usd_per_h(self) -> float | None:
        """Price of all pools at their fullest; None when one has none."""
        prices = [pool.usd_per_h for pool in self.pools]
        return None if None in prices else sum(price[1] for price in prices if price)

    def service(self, name: str) -> ServicePlan:
        return next(service for service in self.services if service.name == name)


def plan(stack: Stack) -> Plan:
    """Choose what `stack` leaves to the planner and estimate everything that it declares.

    Raises `Unplannable` for an instance type that the catalogue lacks, and for a layout or an `auto` that cannot be.
    """
    for pool in stack.node_pools:
        _know(pool)
    resolved = resolve(stack)
    stack = resolved.stack
    machine = {pool.name: instance(pool.instance) for pool in stack.node_pools}
    training = stack.training
    return Plan(
        stack=stack,
        chosen=resolved.chosen,
        pools=tuple(_plan_pool(pool) for pool in stack.node_pools),
        training=plan_training(training, pool=stack.pool(training.pool), instance=machine[training.pool])
        if training
        else None,
        services=tuple(
            plan_service(service, training=stack.trains(service), instance=machine[service.pool])
            for service in stack.services
        ),
    )


def _know(pool: NodePool) -> None:
    try:
        if pool.instance != AUTO:
            instance(pool.instance)
    except ValueError as error:
        raise Unplannable(f"node_pools.{pool.name}.instance", str(error)) from None


def _plan_pool(pool: NodePool) -> PoolPlan:
    machine = instance(pool.instance)
    return PoolPlan(
        name=pool.name,
        instance=machine.name,
        gpu=machine.gpu,
        nodes=(pool.min_nodes, pool.max_nodes),
        gpus=machine.gpus * pool.max_nodes,
        usd_per_h=None if machine.price is None else (pool.min_nodes * machine.price, pool.max_nodes * machine.price),
        price=f"{machine.price_source}, {machine.price_date}",
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for `plan.json` and `--json`."""
    return {
        "chosen": [asdict(chosen) for chosen in plan.chosen],
        "pools": [asdict(pool) for pool in plan.pools],
        "training": asdict(plan.training) if plan.training else None,
        "services": [asdict(service) for service in plan.services],
    }
