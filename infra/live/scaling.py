"""What an autoscaler sees and why it does not do more: pure functions of objects."""

from collections.abc import Iterator
from typing import Any

from infra.live.snapshot import Snapshot
from infra.local.objects import entries, section

Json = dict[str, Any]


def scaling_of(deployment: Json, seen: Snapshot) -> list[str]:
    """Of each HorizontalPodAutoscaler (KEDA's too) of a Deployment: what it measures, what it wants, what holds it."""
    name = deployment["metadata"]["name"]
    own = [a for a in seen.autoscalers if a["spec"]["scaleTargetRef"]["name"] == name]
    return [said for autoscaler in own for said in _say(autoscaler)]


def _say(autoscaler: Json) -> Iterator[str]:
    spec, status = autoscaler["spec"], section(autoscaler, "status")
    conditions = {c["type"]: c for c in entries(status, "conditions")}
    active = conditions.get("ScalingActive")
    least, most = spec.get("minReplicas", 1), spec["maxReplicas"]
    if active and active["status"] == "False":
        if active.get("reason") == "ScalingDisabled":
            yield "the autoscaler rests: the Deployment has no replicas"
        else:
            yield f"the autoscaler sees nothing: {_cause(active)}; {_mend(active.get('reason', ''))}"
        return
    seen = ", ".join(_metrics(spec, status)) or "no measurement yet"
    current, wanted = status.get("currentReplicas", 0), status.get("desiredReplicas", 0)
    yield f"autoscaler: {seen}; {current} of {least} to {most} replicas" + (
        f", wants {wanted}" if wanted != current else ""
    )
    limited, able = conditions.get("ScalingLimited"), conditions.get("AbleToScale")
    if limited and limited["status"] == "True" and limited.get("reason") == "TooManyReplicas":
        yield f"the autoscaler would have more and may not: max_replicas is {most}"
    if able and able["status"] == "False":
        yield f"the autoscaler cannot scale: {able.get('message', '')}"


def _metrics(spec: Json, status: Json) -> Iterator[str]:
    """`slipway_serve_requests_in_flight 3 a replica (8 wanted)`."""
    found = {_name(metric): metric for metric in entries(status, "currentMetrics") if _name(metric)}
    for metric in entries(spec, "metrics"):
        name, target = _name(metric), _amount(section(_body(metric), "target"))
        current = _amount(section(_body(found[name]), "current")) if name in found else None
        yield f"{name} {'not measured' if current is None else current} ({target} wanted)"


def _body(metric: Json) -> Json:
    kind = metric.get("type", "")
    return section(metric, kind[:1].lower() + kind[1:])


def _name(metric: Json) -> str:
    body = _body(metric)
    return section(body, "metric").get("name") or body.get("name", "")


def _amount(of: Json) -> str | None:
    if of.get("averageUtilization") is not None:
        return f"{of['averageUtilization']} %"
    value = of.get("averageValue") or of.get("value")
    if value is None:
        return None
    number = str(value)
    return f"{int(number[:-1]) / 1000:g}" if number.endswith("m") else number


def _cause(condition: Json) -> str:
    """The message, without how the controller came to it."""
    return str(condition.get("message") or condition.get("reason")).rpartition("unable to compute the replica count: ")[
        2
    ]


def _mend(reason: str) -> str:
    if reason in ("FailedGetPodsMetric", "FailedGetExternalMetric", "FailedGetObjectMetric"):
        return "is the adapter of Prometheus (or KEDA) there, and does Prometheus scrape the service?"
    if reason == "FailedGetResourceMetric":
        return "is metrics-server there?"
    return "see `kubectl describe hpa`"
