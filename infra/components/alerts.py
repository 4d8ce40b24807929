"""Alert rules as plain dicts, tied to the objectives and the autoscaling of the stack: a pure function of the spec."""

from typing import Any

from infra.components.recordings import recording_rules
from infra.spec import Objectives, Service, Stack

Json = dict[str, Any]
# Multi-window burn rate: 2 % of a month's error budget in an hour (Google SRE Workbook, ch. 5).
FAST_BURN = 14.4
UNSERVED = "envoy_cluster_upstream_cx_none_healthy"
SERVER_ERRORS = 'outcome=~"error|unavailable"'


def rule_groups(stack: Stack) -> list[Json]:
    """`spec.groups` of the PrometheusRule: one group a service (and one of what is recorded for it), one for the training."""
    groups = [group for service in stack.services for group in (*_recordings(service, stack), _service(service, stack))]
    groups += [_training(stack)] if stack.training else []
    wanted = [group | {"rules": [_as_wanted(rule, stack) for rule in group["rules"]]} for group in groups]
    kept = [group | {"rules": [rule for rule in group["rules"] if rule]} for group in wanted]
    return [group for group in kept if group["rules"]]


def _as_wanted(rule: Json, stack: Stack) -> Json | None:
    """The rule as `monitoring.alerts` has it; None where that switches it off."""
    found = stack.monitoring.alerts.get(rule.get("alert", ""))
    if found is None:
        return rule
    if not found.enabled:
        return None
    return rule if found.after_s is None else rule | {"for": f"{found.after_s}s"}


def series(metric: str, stack: Stack, service: Service | None = None, *, extra: str = "") -> str:
    """Selector of `metric` in the stack's namespace: `metric{namespace="…", inference_service="…"}`."""
    matchers = [f'namespace="{stack.platform.namespace}"']
    if service:
        matchers.append(f'inference_service="{service.name}"')
    return f"{metric}{{{', '.join([*matchers, *filter(None, [extra])])}}}"


def p95(metric: str, stack: Stack, service: Service) -> str:
    """95th percentile of a histogram over five minutes, all replicas together."""
    return f"histogram_quantile(0.95, sum by (le) (rate({series(metric + '_bucket', stack, service)}[5m])))"


def error_share(stack: Stack, service: Service, window: str) -> str:
    """Share of requests that ended in an error of the server's, or at the router for want of a server that is ready."""
    # Of another runtime the router counts every answer, its own too.
    missed = [unserved(stack, service)] if stack.runtime(service).is_own else []
    bad = [series("slipway_serve_requests_total", stack, service, extra=SERVER_ERRORS), *missed]
    all_of = [series("slipway_serve_requests_total", stack, service), *missed]

    def rate(those: list[str]) -> str:
        # A series that is not there yet is no error, and must not make the sum absent.
        return " + ".join(f"(sum(rate({one}[{window}])) or vector(0))" for one in those)

    return f"({rate(bad)}) / ({rate(all_of)})"


def unserved(stack: Stack, service: Service) -> str:
    """Selector of the router's count of requests that found no replica ready."""
    return f'{UNSERVED}{{namespace="{stack.platform.namespace}", envoy_cluster_name="{service.name}"}}'


def _recordings(service: Service, stack: Stack) -> list[Json]:
    rules = recording_rules(service, stack)
    return [{"name": f"slipway-{service.name}-metrics", "rules": rules}] if rules else []


def _service(service: Service, stack: Stack) -> Json:
    goals: Objectives = stack.monitoring.objectives
    burn = FAST_BURN * (1 - goals.availability)
    ready = series("slipway_serve_ready", stack, service)
    rules = [
        *_latencies(service, stack),
        _alert(
            "SlipwayErrorBudgetBurning",
            f"{error_share(stack, service, '1h')} > {burn:.6g} and {error_share(stack, service, '5m')} > {burn:.6g}",
            wait="2m",
            severity="critical",
            summary=f"{service.name}: errors use up the budget of {goals.availability:.3%} availability in two days",
        ),
        _alert(
            "SlipwayNoReplicaReady",
            # With nothing to scrape at all, the sum is absent and not 0. Where none is what the stack wants, one must be missed.
            f"(sum({ready}) or vector(0)) == 0"
            + ("" if service.least_replicas else f" and {_is_called(service, stack)}"),
            wait="15m",
            severity="critical",
            summary=f"{service.name}: no replica can answer",
        ),
    ]
    if service.autoscaling:
        scaling = service.autoscaling
        load = series("slipway_serve_requests_in_flight", stack, service)
        most = scaling.target_in_flight * scaling.max_replicas
        rules.append(
            _alert(
                "SlipwayAtMaxReplicas",
                f"sum({load}) > {most:g}",
                wait="15m",
                severity="warning",
                summary=f"{service.name}: more requests in flight than {scaling.max_replicas} replicas should hold ({most:g})",
            )
        )
    return {"name": f"slipway-{service.name}", "rules": rules}


def _is_called(service: Service, stack: Stack) -> str:
    return f"sum(rate({unserved(stack, service)}[5m])) > 0"


def _latencies(service: Service, stack: Stack) -> list[Json]:
    """Of a runtime that does not measure a latency nothing is said: an alert on no data would never fire."""
    goals, runtime = stack.monitoring.objectives, stack.runtime(service)
    rules: list[Json] = []
    if runtime.emits("slipway_serve_ttft_seconds"):
        rules.append(
            _alert(
                "SlipwayTimeToFirstTokenHigh",
                f"{p95('slipway_serve_ttft_seconds', stack, service)} > {goals.ttft_p95_s}",
                wait="10m",
                severity="warning",
                summary=f"{service.name}: 95% of first tokens take longer than {goals.ttft_p95_s} s",
            )
        )
    if runtime.emits("slipway_serve_tpot_seconds"):
        rules.append(
            _alert(
                "SlipwayTimePerTokenHigh",
                f"{p95('slipway_serve_tpot_seconds', stack, service)} > {goals.tpot_p95_s}",
                wait="10m",
                severity="warning",
                summary=f"{service.name}: tokens come slower than one in {goals.tpot_p95_s} s (95th percentile)",
            )
        )
    return rules


def _training(stack: Stack) -> Json:
    training = stack.training
    assert training is not None
    step, last = series("slipway_train_step", stack), series("slipway_train_last_checkpoint_step", stack)
    loss = series("slipway_train_loss", stack)
    overdue = 2 * training.checkpoint.every_steps
    jobs = series("kube_job_status_failed", stack, extra='job_name=~"(data|train|promote)-.*"')
    rules = [
        _alert(
            "SlipwayTrainingStalled",
            f"changes({step}[30m]) == 0",
            wait="5m",
            severity="critical",
            summary=f"{training.name}: no training step in half an hour, and the GPUs are paid for",
        ),
        _alert(
            "SlipwayCheckpointOverdue",
            f"max({step}) - max({last}) > {overdue}",
            wait="1m",
            severity="warning",
            summary=f"{training.name}: more than {overdue} steps would be lost now",
        ),
        # NaN is the only number that is not equal to itself.
        _alert(
            "SlipwayLossNotFinite",
            f"{loss} != {loss}",
            wait="1m",
            severity="critical",
            summary=f"{training.name}: the loss is not a number",
        ),
        _alert(
            "SlipwayJobFailed",
            f"{jobs} > 0",
            wait="1m",
            severity="warning",
            summary=f"{training.name}: a pod of {{{{ $labels.job_name }}}} failed",
        ),
    ]
    return {"name": f"slipway-train-{training.name}", "rules": rules}


def _alert(name: str, expression: str, *, wait: str, severity: str, summary: str) -> Json:
    return {
        "alert": name,
        "expr": expression,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }
