"""SLW7xx: what it costs against what it may cost, and what is paid for and not used."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from infra.catalog import Instance, instances
from infra.checks.demand import Demand, demands, pools
from infra.checks.finding import Finding, Patch
from infra.planner import Plan
from infra.spec import NodePool, Stack

HOURS_A_MONTH = 730
IDLE_SHARE = 0.25
"""Share of a pool's GPUs that may be left over at full scale before it is said."""
TIME_ERROR = 1.35
"""What nine of ten estimates of a run's time err by at most (docs/planner.md)."""
WORTH_CHANGING = 0.10
"""Share of the price that another instance must save to be named."""


def within_budget(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW701: nodes at full scale against `budget.usd_per_h`; SLW702: a run against `budget.usd_per_run`; SLW703: a budget that
    cannot be held, since no price is known."""
    budget = stack.budget
    if budget.usd_per_h is not None and plan.usd_per_h is not None and plan.usd_per_h > budget.usd_per_h:
        unused = _nodes_that_nothing_uses(stack)
        enough = plan.usd_per_h - _saved_per_h(stack, unused) <= budget.usd_per_h
        yield Finding(
            code="SLW701",
            severity="error",
            where="budget.usd_per_h",
            message=f"all pools at their fullest cost {plan.usd_per_h:.2f} USD/h, and the budget is {budget.usd_per_h:.2f}",
            fix="; ".join(f"{key}: {value}, which is all that is used" for key, value in unused.items())
            if enough
            else "fewer replicas or nodes, cheaper instances, or a larger budget",
            patch=unused if enough else None,
        )
    usd = plan.training.usd if plan.training else None
    if budget.usd_per_run is not None and usd is not None and usd > budget.usd_per_run:
        yield Finding(
            code="SLW702",
            severity="error",
            where="budget.usd_per_run",
            message=f"a training run costs about {usd:.0f} USD on demand, and the budget is {budget.usd_per_run:.0f}",
            fix="fewer steps, a cheaper instance, or a larger budget",
        )
    if budget != type(budget)() and plan.usd_per_h is None:
        names = ", ".join(pool.instance for pool in plan.pools if pool.usd_per_h is None)
        yield Finding(
            code="SLW703",
            severity="warn",
            where="budget",
            message=f"the catalogue has no price of {names}, so the budget cannot be held",
            fix="add the price to a TOML file that $SLIPWAY_CATALOG names",
        )


def run_meets_deadline(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW706: a run that takes longer than `training.deadline_h`; an error where no error of the estimate would save it."""
    training, run = stack.training, plan.training
    if training is None or run is None or training.deadline_h is None or run.hours.value <= training.deadline_h:
        return
    never = run.hours.value > TIME_ERROR * training.deadline_h
    nodes = ceil(training.nodes * run.hours.value / training.deadline_h)
    yield Finding(
        code="SLW706",
        severity="error" if never else "warn",
        where="training.deadline_h",
        message=f"the run takes about {run.hours.value:.1f} h, and {training.deadline_h:g} are allowed",
        fix=f"about {nodes} nodes, a faster instance, fewer steps, or a later deadline",
    )


def gpus_are_used(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW704: GPUs of nodes that nothing of the stack can use, in USD a month, with the instance that fits better."""
    of_pool = pools(stack)
    for name, asked in demands(stack).items():
        pool, machine = of_pool[name]
        nodes = min(_nodes(asked, machine), pool.max_nodes)
        idle = nodes * machine.gpus - sum(demand.gpus * demand.most for demand in asked)
        if not machine.gpus or machine.price is None or not nodes or idle / (nodes * machine.gpus) <= IDLE_SHARE:
            continue
        usd = machine.price * idle / machine.gpus * HOURS_A_MONTH
        better = _better(asked, machine, nodes=nodes)
        yield Finding(
            code="SLW704",
            severity="warn",
            where=f"node_pools.{name}.instance",
            message=f"{idle} of {nodes * machine.gpus} GPUs on {nodes} × {machine.name} idle at full scale: "
            f"{usd:,.0f} USD a month",
            fix=f"{better[0].name} × {better[1]}, which saves {better[2]:,.0f} USD a month"
            if better
            else "more replicas, or fewer CPUs and less memory for each, so that more fit a node",
            patch=_move(pool, better[0], better[1]) if better else None,
        )


def pools_are_used(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW705: nodes that are kept, and that nothing runs on."""
    used = demands(stack)
    for pool, machine in pools(stack).values():
        if pool.name not in used and pool.min_nodes and machine.price:
            usd = pool.min_nodes * machine.price * HOURS_A_MONTH
            yield Finding(
                code="SLW705",
                severity="warn",
                where=f"node_pools.{pool.name}.min_nodes",
                message=f"{pool.min_nodes} × {machine.name} are kept, and nothing runs on them: {usd:,.0f} USD a month",
                fix="min_nodes: 0, or leave the pool out",
                patch={f"node_pools.{pool.name}.min_nodes": 0},
            )


def _nodes(asked: Sequence[Demand], machine: Instance) -> int:
    """Nodes that the users fill at full scale, each by itself."""
    return sum(demand.nodes(demand.most, machine=machine) for demand in asked)


def _nodes_that_nothing_uses(stack: Stack) -> dict[str, int]:
    """`max_nodes` of each pool as low as all of its users at full scale allow."""
    of_pool, asked = pools(stack), demands(stack)
    needed = {name: max(_nodes(asked.get(name, ()), machine), 1) for name, (_, machine) in of_pool.items()}
    return {
        f"node_pools.{name}.max_nodes": max(needed[name], pool.min_nodes)
        for name, (pool, _) in of_pool.items()
        if max(needed[name], pool.min_nodes) < pool.max_nodes
    }


def _saved_per_h(stack: Stack, max_nodes: Mapping[str, int]) -> float:
    """USD/h that pools at their fullest cost less with these `max_nodes`."""
    return sum(
        (pool.max_nodes - max_nodes.get(f"node_pools.{name}.max_nodes", pool.max_nodes)) * (machine.price or 0)
        for name, (pool, machine) in pools(stack).items()
    )


def _better(asked: Sequence[Demand], machine: Instance, *, nodes: int) -> tuple[Instance, int, float] | None:
    """The cheapest instance of the same cloud and GPU, its nodes, and what it saves in a month."""
    assert machine.price is not None
    found: list[tuple[float, str, Instance, int]] = []
    for other in instances().values():
        if (other.cloud, other.gpu) != (machine.cloud, machine.gpu) or other.price is None:
            continue
        if all(demand.on_one_node(other) for demand in asked):
            count = _nodes(asked, other)
            found.append((other.price * count, other.name, other, count))
    price, _, best, count = min(found, default=(machine.price * nodes, "", machine, nodes))
    saved = machine.price * nodes - price
    return (best, count, saved * HOURS_A_MONTH) if saved > WORTH_CHANGING * machine.price * nodes else None


def _move(pool: NodePool, to: Instance, nodes: int) -> Patch:
    key = f"node_pools.{pool.name}"
    least: Patch = {f"{key}.min_nodes": nodes} if pool.min_nodes > nodes else {}
    return {f"{key}.instance": to.name, f"{key}.max_nodes": nodes, **least}
