"""Pure functions from spec × plan to findings, one function a rule. Imports neither Pulumi nor torch."""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches

from infra.checks.autoscaling import metric_is_scraped, scaling_down_waits, target_can_be_reached, traffic_is_served
from infra.checks.capacity import gang_fits_pool, pod_fits_node, ranks_match_gpus, replicas_fit_pool
from infra.checks.cost import gpus_are_used, pools_are_used, run_meets_deadline, within_budget
from infra.checks.directories import enforce_directories, nodes_have_no_directory
from infra.checks.finding import Finding, Patch, Refused
from infra.checks.grading import graded
from infra.checks.manifest_sets import MANIFEST_CHECKS, SET_CHECKS, check_manifests
from infra.checks.memory import context_fits_cache, replica_fits, training_fits
from infra.checks.rollout import (
    checkpoints_are_worth_it,
    drain_fits_notice,
    load_time_is_enough,
    nothing_hangs_on_one_pod,
    surge_has_room,
)
from infra.checks.scheduling import (
    batch_divides,
    capacity_can_be_ordered,
    classifiers_are_not_served,
    clouds_agree,
    gpus_are_asked_for,
    layout_can_be_trained,
    runtime_class_has_gpus,
    services_have_a_model,
    volumes_are_shared,
)
from infra.checks.security import (
    admin_is_closed,
    endpoint_asks_for_keys,
    images_are_pinned,
    network_is_closed,
    stores_can_be_opened,
)
from infra.checks.sharing import pool_holds_all, quota_holds_all
from infra.checks.volumes import checkpoints_fit, packages_fit
from infra.planner import Plan
from infra.spec import Stack

Check = Callable[[Stack, Plan], Iterator[Finding]]


def severities_name_codes(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW001: a severity for a code that does not exist would be silently without effect."""
    for code in stack.checks:
        if code not in CODES:
            near = get_close_matches(code, CODES, n=3, cutoff=0.6)
            yield Finding(
                code="SLW001",
                severity="error",
                where=f"checks.{code}",
                message="there is no finding of this code",
                fix=f"the nearest are {', '.join(near)}" if near else "docs/checks.md lists them",
            )


CHECKS: tuple[Check, ...] = (
    severities_name_codes,
    gang_fits_pool,
    ranks_match_gpus,
    replicas_fit_pool,
    pod_fits_node,
    pool_holds_all,
    quota_holds_all,
    training_fits,
    replica_fits,
    context_fits_cache,
    checkpoints_fit,
    packages_fit,
    batch_divides,
    volumes_are_shared,
    clouds_agree,
    services_have_a_model,
    capacity_can_be_ordered,
    gpus_are_asked_for,
    runtime_class_has_gpus,
    layout_can_be_trained,
    classifiers_are_not_served,
    nodes_have_no_directory,
    metric_is_scraped,
    target_can_be_reached,
    scaling_down_waits,
    traffic_is_served,
    load_time_is_enough,
    drain_fits_notice,
    nothing_hangs_on_one_pod,
    checkpoints_are_worth_it,
    surge_has_room,
    network_is_closed,
    endpoint_asks_for_keys,
    admin_is_closed,
    images_are_pinned,
    stores_can_be_opened,
    within_budget,
    run_meets_deadline,
    gpus_are_used,
    pools_are_used,
)


def codes_of(rule: Callable[..., Iterator[Finding]]) -> dict[str, str]:
    """What each code of a rule means, as the first paragraph of its docstring says it: `CODE: MEANING; CODE: MEANING.`"""
    said = " ".join((rule.__doc__ or "").partition("\n\n")[0].split())
    found = re.findall(r"(SLW\d{3}): ((?:(?!SLW\d{3}: ).)+)", said)
    return {code: meaning.strip().rstrip(";.") for code, meaning in found}


CODES: Mapping[str, str] = dict(
    sorted(item for rule in (*MANIFEST_CHECKS, *SET_CHECKS, *CHECKS) for item in codes_of(rule).items())
)


def check(stack: Stack, plan: Plan) -> tuple[Finding, ...]:
    """All findings, errors first, with the severities that the stack's `checks` sets."""
    return graded([finding for rule in CHECKS for finding in rule(plan.stack, plan)], stack.checks)


def enforce(stack: Stack, plan: Plan) -> tuple[Finding, ...]:
    """The findings that only warn. Raises `Refused` when one is an error."""
    findings = check(stack, plan)
    if any(finding.severity == "error" for finding in findings):
        raise Refused(findings)
    return findings


__all__ = [
    "CHECKS",
    "CODES",
    "MANIFEST_CHECKS",
    "SET_CHECKS",
    "Finding",
    "Patch",
    "Refused",
    "check",
    "check_manifests",
    "codes_of",
    "enforce",
    "enforce_directories",
]
