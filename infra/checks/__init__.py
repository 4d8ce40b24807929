"""Pure functions from spec × plan to findings, one function a rule. Imports neither Pulumi nor torch."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from infra.checks.capacity import gang_fits_pool, ranks_match_gpus, replicas_fit_pool
from infra.checks.cost import within_budget
from infra.checks.finding import Finding, Refused
from infra.checks.memory import context_fits_cache, replica_fits, training_fits
from infra.checks.scheduling import batch_divides, clouds_agree, volumes_are_shared
from infra.planner import Plan
from infra.spec import Stack

Check = Callable[[Stack, Plan], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    gang_fits_pool,
    ranks_match_gpus,
    replicas_fit_pool,
    training_fits,
    replica_fits,
    context_fits_cache,
    batch_divides,
    volumes_are_shared,
    clouds_agree,
    within_budget,
)


def check(stack: Stack, plan: Plan) -> tuple[Finding, ...]:
    """All findings, errors first, with the severities that the stack's `checks` sets."""
    found = [finding for rule in CHECKS for finding in rule(stack, plan)]
    wanted = [(finding, stack.checks.get(finding.code, finding.severity)) for finding in found]
    kept = [replace(finding, severity=severity) for finding, severity in wanted if severity != "off"]
    return tuple(sorted(kept, key=lambda finding: (finding.severity, finding.code, finding.where)))


def enforce(stack: Stack, plan: Plan) -> tuple[Finding, ...]:
    """The findings that only warn. Raises `Refused` when one is an error."""
    findings = check(stack, plan)
    if any(finding.severity == "error" for finding in findings):
        raise Refused(findings)
    return findings


__all__ = ["CHECKS", "Finding", "Refused", "check", "enforce"]
