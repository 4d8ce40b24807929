"""SLW5xx: starts, roll-outs and interruptions that lose nothing."""

from collections.abc import Iterator

from infra.catalog import instance
from infra.checks.demand import demands, pools
from infra.checks.finding import Finding, Patch
from infra.planner import Plan
from infra.planner import plan as make_plan
from infra.spec import Service, Stack
from infra.spec.serving import EXIT_S, LINGER_S, PRE_STOP_S

START_S = 60
"""What the startup probe and the roll-out's deadline add to twice `load_s`."""
NOTICE_S = {"aws": 120, "gcp": 30, "azure": 30}
"""Seconds between a spot interruption's notice and the end of the node, by the clouds' documentation."""
LEAVING_S = PRE_STOP_S + LINGER_S + EXIT_S
"""Of a server's end, beside its drain."""
WORTH_SAVING_H = 1.0
"""Hours of a gang's work that an interruption may lose before it is said."""


def load_time_is_enough(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW501: a declared `load_s` far below the estimate: probes and the roll-out give up on a server that is still loading."""
    declared = [service for service in stack.services if service.load_s is not None]
    if not declared:
        return
    undeclared = tuple(service.model_copy(update={"load_s": None, "traffic": None}) for service in declared)
    estimates = make_plan(stack.model_copy(update={"services": undeclared})).services
    for service, estimate in zip(declared, estimates, strict=True):
        assert service.load_s is not None
        if START_S + 2 * service.load_s < estimate.load_s:
            yield Finding(
                code="SLW501",
                severity="warn",
                where=f"services.{service.name}.load_s",
                message=f"load_s {service.load_s} gives a start {START_S + 2 * service.load_s} s, and the model takes about "
                f"{estimate.load_s} s to load",
                fix=f"load_s: {estimate.load_s}, or leave it out",
                patch={f"services.{service.name}.load_s": None},
            )


def drain_fits_notice(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW502: a spot node is gone before streams of `drain_s` are finished."""
    notice = NOTICE_S.get(stack.platform.cloud)
    of_pool = pools(stack)
    for service in stack.services:
        pool, _machine = of_pool[service.pool]
        if notice and "spot" in pool.capacity and service.drain_s + LEAVING_S > notice:
            yield Finding(
                code="SLW502",
                severity="warn",
                where=f"services.{service.name}.drain_s",
                message=f"streams get {service.drain_s} s to finish, and a spot node of {stack.platform.cloud} is gone "
                f"{notice} s after its notice: longer ones are cut",
                fix=f"drain_s: {notice - LEAVING_S}, or on-demand capacity for pool {pool.name!r}",
                patch={f"services.{service.name}.drain_s": notice - LEAVING_S},
            )


def nothing_hangs_on_one_pod(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW503: one replica, in production, is none while it is rolled or its node goes; a surge bridges roll-outs only."""
    of_pool = pools(stack)
    for service in stack.services:
        pool, _machine = of_pool[service.pool]
        one_machine = stack.platform.cloud == "local" and pool.max_nodes == 1
        alone = service.least_replicas == 1 and not service.surge
        if service.channel == "production" and alone and not one_machine:
            yield Finding(
                code="SLW503",
                severity="warn",
                where=f"services.{service.name}.{'autoscaling.min_replicas' if service.autoscaling else 'replicas'}",
                message="one replica and no surge: each roll-out, and each node that goes, leaves the service without one",
                fix=f"2 replicas, or surge: true where pool {pool.name!r} has room for one more",
                patch=_second(stack, service),
            )
    if stack.services and stack.router.replicas == 1 and stack.platform.cloud != "local":
        yield Finding(
            code="SLW503",
            severity="warn",
            where="router.replicas",
            message="one router: every service is away while its node is",
            fix="replicas: 2",
            patch={"router.replicas": 2},
        )


def checkpoints_are_worth_it(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW504: an interrupted run begins again at its last checkpoint; on spot it will be interrupted."""
    training, run = stack.training, plan.training
    if training is None or run is None:
        return
    spot = "spot" in stack.pool(training.pool).capacity
    every_h = training.checkpoint.every_steps * run.step.value / 3600
    too_long_h = max(WORTH_SAVING_H, 2 * run.best_checkpoint_s / 3600)
    none_before_the_end = training.checkpoint.every_steps >= training.steps and run.hours.value > WORTH_SAVING_H
    wanted = max(min(run.best_checkpoint_steps, training.steps // 2), 1)
    if wanted >= training.checkpoint.every_steps or not (none_before_the_end or (spot and every_h > too_long_h)):
        return
    yield Finding(
        code="SLW504",
        severity="warn",
        where="training.checkpoint.every_steps",
        message=f"{training.checkpoint.every_steps} steps take about {every_h:.1f} h"
        + (
            ", and the run has no more: whatever stops it, it begins again"
            if none_before_the_end
            else f", which an interruption of one of {training.nodes} spot nodes loses (about {run.interruptions:.2g} in a run)"
        ),
        fix=f"every_steps: {wanted}, each {wanted * run.step.value / 60:.0f} min, which loses the least (Young 1974)",
        patch={"training.checkpoint.every_steps": wanted},
    )


def surge_has_room(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW505: a roll-out that waits for a surge pod which its pool cannot hold never ends."""
    of_pool = pools(stack)
    asked = {demand.user: demand for users in demands(stack).values() for demand in users}
    for service in stack.services:
        pool, machine = of_pool[service.pool]
        room = asked[f"services.{service.name}"].on_one_node(machine) * pool.max_nodes
        if service.surge and service.most_replicas == room:
            needed = asked[f"services.{service.name}"].nodes(room + 1, machine=machine)
            yield Finding(
                code="SLW505",
                severity="error",
                where=f"services.{service.name}.surge",
                message=f"a roll-out at {room} replicas starts one more, and pool {pool.name!r} can hold {room}: it waits for ever",
                fix=f"surge: false, which rolls within what is there, or max_nodes: {needed} for the pool",
                patch={f"services.{service.name}.surge": False},
            )


def _second(stack: Stack, service: Service) -> Patch | None:
    """A second replica where the pool has room and the autoscaler may; else a surge; else none."""
    pool = stack.pool(service.pool)
    asked = next(d for d in demands(stack)[service.pool] if d.user == f"services.{service.name}")
    room = asked.on_one_node(instance(pool.instance)) * pool.max_nodes
    if room < 2:
        return None
    if not service.autoscaling:
        return {f"services.{service.name}.replicas": 2}
    if service.most_replicas > 1:
        return {f"services.{service.name}.autoscaling.min_replicas": 2}
    return {f"services.{service.name}.surge": True}
