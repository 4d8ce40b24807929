"""SLW4xx: a metric that is emitted, scraped and can reach its target; windows longer than what they wait for."""

from collections.abc import Iterator

from infra.checks.finding import Finding
from infra.planner import Plan, ServicePlan
from infra.spec import Service, Stack

HEADROOM = 0.75
"""Share of what decodes together at which scaling should begin: a replica more takes its load time to come."""


def metric_is_scraped(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW401: an autoscaler whose metric nobody scrapes never scales. The network policies let nobody else scrape either."""
    closed = stack.tenancy.network_policies
    for service in stack.services:
        if service.autoscaling and not stack.monitoring.enabled:
            yield Finding(
                code="SLW401",
                severity="error" if closed else "warn",
                where=f"services.{service.name}.autoscaling",
                message="scales on slipway_serve_requests_in_flight, and monitoring.enabled is false: nothing scrapes it"
                + (", and the network policies let nothing else scrape" if closed else ""),
                fix="monitoring.enabled: true, or a fixed number of replicas",
                patch={"monitoring.enabled": True},
            )


def target_can_be_reached(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW402: a target that in-flight requests cannot pass never fires; one above what decodes together fires when there is a queue."""
    for service, planned in zip(stack.services, plan.services, strict=True):
        scaling = service.autoscaling
        if scaling is None or scaling.target_in_flight <= service.max_num_seqs:
            continue
        # A waiting request has a token at least, and 429 is what comes above the queue's limit, which is a context at the least.
        ceiling = service.max_num_seqs + max(service.max_queued_tokens, planned.max_model_len or 0)
        never = planned.max_model_len is not None and scaling.target_in_flight >= ceiling
        wanted = max(int(HEADROOM * service.max_num_seqs), 1)
        yield Finding(
            code="SLW402",
            severity="error" if never else "warn",
            where=f"services.{service.name}.autoscaling.target_in_flight",
            message=f"target {scaling.target_in_flight:g}, and a replica holds at most {ceiling} requests: it never scales"
            if never
            else f"target {scaling.target_in_flight:g}, and a replica decodes {service.max_num_seqs} at once: "
            f"{scaling.target_in_flight - service.max_num_seqs:g} always wait before another one is started",
            fix=f"target_in_flight: {wanted}, or a larger max_num_seqs",
            patch={f"services.{service.name}.autoscaling.target_in_flight": wanted},
        )


def scaling_down_waits(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW403: a replica that is taken away faster than it loads is missed by the next burst, and loads again."""
    load_s = {service.name: service.load_s for service in plan.services}
    for service in stack.services:
        if _scales(service) and service.autoscaling and service.autoscaling.scale_down_after_s < load_s[service.name]:
            wanted = 60 * -(-2 * load_s[service.name] // 60)
            yield Finding(
                code="SLW403",
                severity="warn",
                where=f"services.{service.name}.autoscaling.scale_down_after_s",
                message=f"replicas go after {service.autoscaling.scale_down_after_s} quiet seconds, and one takes about "
                f"{load_s[service.name]} s to load: load that comes and goes finds none",
                fix=f"scale_down_after_s: {wanted}",
                patch={f"services.{service.name}.autoscaling.scale_down_after_s": wanted},
            )


def traffic_is_served(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW404: declared traffic that the most replicas do not serve within `slo`; SLW405: or within what the alerts allow, which
    then fire from the first day."""
    goals = stack.monitoring.objectives
    for spec, service in zip(stack.services, plan.services, strict=True):
        if spec.traffic is None or service.ttft_p95_s is None:
            continue
        key = f"services.{service.name}.{'autoscaling.max_replicas' if spec.autoscaling else 'replicas'}"
        slow = _slower(service, ttft_p95_s=spec.slo.ttft_p95_s, tpot_p95_s=spec.slo.tpot_p95_s)
        if slow:
            yield Finding(
                code="SLW404",
                severity="warn",
                where=key,
                message=f"{service.replicas[1]} replicas under {spec.traffic.rps:g} requests a second: {slow}",
                fix="more replicas (`replicas: auto` finds how many), a faster instance, or another slo",
            )
        alarmed = _slower(service, ttft_p95_s=goals.ttft_p95_s, tpot_p95_s=goals.tpot_p95_s)
        if alarmed and not slow and stack.monitoring.enabled:
            yield Finding(
                code="SLW405",
                severity="warn",
                where="monitoring.objectives",
                message=f"alerts fire from the first day: {service.name} under its traffic: {alarmed}",
                fix="objectives that the services can meet, or more replicas",
            )


def _slower(service: ServicePlan, *, ttft_p95_s: float, tpot_p95_s: float | None) -> str:
    """What the simulation says is slower than asked; empty for nothing."""
    assert service.ttft_p95_s is not None
    assert service.tpot_p95_s is not None
    if not service.keeps_up:
        return "the queue grows without end"
    said: list[str] = []
    if service.ttft_p95_s > ttft_p95_s:
        said.append(f"first token in {service.ttft_p95_s:.2g} s (p95), and {ttft_p95_s:g} is asked")
    if tpot_p95_s is not None and service.tpot_p95_s > tpot_p95_s:
        said.append(f"{service.tpot_p95_s:.2g} s a token (p95), and {tpot_p95_s:g} is asked")
    return "; ".join(said)


def _scales(service: Service) -> bool:
    return service.least_replicas < service.most_replicas
