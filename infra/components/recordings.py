"""Slipway's metrics for runtimes that have their own: names are changed as they are scraped, sums are recorded by rules.

What a runtime does not count itself (requests by outcome, readiness, where needed requests in flight) the router counts.
Pure functions of the spec: after them, autoscaling, dashboards and alerts name no runtime.
"""

import re
from typing import Any

from infra.spec import Runtime, Service, Stack

Json = dict[str, Any]
SERIES = ("", "_bucket", "_sum", "_count")
"""Endings that the series of one metric have."""
OUTCOMES = {"2": "stop", "4": "invalid", "5": "error"}
"""First digit of the status → outcome, in the words of Slipway's own server."""


def relabelings(runtime: Runtime) -> list[Json]:
    """`metricRelabelings` of a scrape: the runtime's names become Slipway's."""
    rules: list[Json] = []
    for ours, theirs in runtime.metrics.names.items():
        rules.append(
            {
                "sourceLabels": ["__name__"],
                "regex": f"{re.escape(theirs)}({'|'.join(SERIES[1:])})?",
                "targetLabel": "__name__",
                "replacement": f"{ours}$1",
            }
        )
    return rules


def recording_rules(service: Service, stack: Stack) -> list[Json]:
    """Rules that make the metrics which the runtime of `service` has no counterpart of; none for Slipway's own server."""
    runtime = stack.runtime(service)
    if runtime.is_own:
        return []
    return [_in_flight(service, runtime, stack), _ready(service, stack), *_outcomes(service, stack)]


def _in_flight(service: Service, runtime: Runtime, stack: Stack) -> Json:
    """Waiting and running together, by replica where replicas count, else over all of them as the router sees it."""
    if not runtime.counts_in_flight:
        return _record(
            "slipway_serve_requests_in_flight", _summed("envoy_cluster_upstream_rq_active", service, stack), service
        )
    own = f'{{namespace="{stack.platform.namespace}", inference_service="{service.name}"}}'
    parts = [f"slipway_serve_requests_{state}{own}" for state in ("running", "waiting")]
    by_replica = " + ".join(f"sum by (namespace, pod) ({part})" for part in parts)
    return _record("slipway_serve_requests_in_flight", by_replica, service)


def _ready(service: Service, stack: Stack) -> Json:
    """Replicas that the router's health checks find ready. Each router pod sees all of them."""
    healthy = _selector("envoy_cluster_membership_healthy", service, stack)
    return _record("slipway_serve_ready", f"max by (namespace) ({healthy})", service)


def _outcomes(service: Service, stack: Stack) -> list[Json]:
    """By router pod, so that a counter that starts again is seen as one."""
    rules: list[Json] = []
    for digit, outcome in OUTCOMES.items():
        extra = f', envoy_response_code_class="{digit}"'
        answered = _selector("envoy_cluster_upstream_rq_xx", service, stack, extra=extra)
        rule = _record("slipway_serve_requests_total", f"sum by (namespace, pod) ({answered})", service)
        rules.append(rule | {"labels": rule["labels"] | {"outcome": outcome}})
    return rules


def _summed(metric: str, service: Service, stack: Stack) -> str:
    return f"sum by (namespace) ({_selector(metric, service, stack)})"


def _selector(metric: str, service: Service, stack: Stack, *, extra: str = "") -> str:
    return f'{metric}{{namespace="{stack.platform.namespace}", envoy_cluster_name="{service.name}"{extra}}}'


def _record(name: str, expression: str, service: Service) -> Json:
    return {"record": name, "expr": expression, "labels": {"inference_service": service.name}}
