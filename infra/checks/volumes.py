"""SLW205, SLW206: what a run writes against the volumes that it writes to."""

from collections.abc import Iterator
from math import ceil

from infra.checks.finding import Finding
from infra.planner import Plan
from infra.spec import Stack

GIB = 2**30
CHECKPOINT_BYTES = 12
"""A parameter in a checkpoint: the fp32 weight and two moments of AdamW."""
OUTER_BYTES = 16
"""More of it under local SGD: weights at the last meeting and when sent, momentum, the sum of a fragment that travels."""
PACKAGE_BYTES = 4
"""A parameter in a model package."""


def checkpoints_fit(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW205: a full volume ends a run at its next checkpoint. A new one is written before the oldest is removed."""
    training, run = stack.training, plan.training
    if training is None or run is None:
        return
    saved = min(training.checkpoint.keep + 1, -(-training.steps // training.checkpoint.every_steps))
    if training.checkpoint.url:
        saved = 0
    # Under local SGD each replica has weights, moments and an outer state of its own; of a launch they are one.
    apart = training.launches if training.meets else run.replicas if training.local_sgd else 1
    each = apart * (CHECKPOINT_BYTES + (OUTER_BYTES if training.local_sgd else 0))
    needed = run.parameters * (saved * each + training.launches * PACKAGE_BYTES) / GIB
    if needed > stack.storage.runs_gib:
        yield Finding(
            code="SLW205",
            severity="error",
            where="storage.runs_gib",
            message=f"{saved} checkpoints and a package of {run.parameters / 1e9:.3g} B parameters take {needed:.0f} GiB, "
            f"and the volume of runs has {stack.storage.runs_gib}",
            fix=f"runs_gib: {ceil(1.2 * needed)}, or a smaller checkpoint.keep",
            patch={"storage.runs_gib": ceil(1.2 * needed)},
        )


def packages_fit(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW206: the registry's volume holds no model at all, or only one: publishing a second fails."""
    run = plan.training
    if run is None or stack.registry.url is not None:
        return
    one = run.parameters * PACKAGE_BYTES / GIB
    if 2 * one > stack.registry.size_gib:
        yield Finding(
            code="SLW206",
            severity="error" if one > stack.registry.size_gib else "warn",
            where="registry.size_gib",
            message=f"a package takes {one:.1f} GiB, and the registry's volume has {stack.registry.size_gib}: "
            + ("none fits" if one > stack.registry.size_gib else "the next one does not fit beside it"),
            fix=f"size_gib: {ceil(5 * one)}",
            patch={"registry.size_gib": ceil(5 * one)},
        )
