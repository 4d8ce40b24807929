"""What an autoscaler sees and why it does not do more: pure functions of objects."""

import re
from collections.abc import Iterator
from typing import Any

from infra.live.snapshot import Snapshot
from infra.local.objects import entries, section

Json = dict[str, Any]
_OF_KEDA = re.compile(r"s(\d+)-")
"""How names of metrics begin that KEDA answers: by the number of the trigger."""
_SERIES = re.compile(r"slipway_\w+")


def scaling_of(deployment: Json, seen: Snapshot) -> list[str]:
    """Of each ScaledObject and HorizontalPodAutoscaler of a Deployment: what it measures, what it wants, what holds it."""
    name = deployment["metadata"]["name"]
    objects = [one for one in seen.scaled_objects if one["spec"]["scaleTargetRef"]["name"] == name]
    own = [one for one in seen.autoscalers if one["spec"]["scaleTargetRef"]["name"] == name]
    triggers = [trigger for one in objects for trigger in entries(one["spec"], "triggers")]
    return [
        *(said for one in objects for said in _say_keda(one, deployment)),
        *(said for one in own for said in _say(one, triggers)),
    ]


def _say_keda(scaled: Json, deployment: Json) -> Iterator[str]:
    """What KEDA itself says; how many replicas there are to be, the autoscaler that it makes says."""
    conditions = {one["type"]: one for one in entries(section(scaled, "status"), "conditions")}
    ready = conditions.get("Ready")
    asked = ", ".join(section(one, "metadata").get("serverAddress", "") for one in entries(scaled["spec"], "triggers"))
    if ready is None:
        yield "KEDA has not taken up its ScaledObject yet; is KEDA there?"
    elif ready["status"] != "True":
        yield f"KEDA cannot scale it: {ready.get('message')}; does Prometheus answer at {asked}?"
    elif _holds(conditions.get("Paused")):
        yield "KEDA rests: its ScaledObject is paused"
    elif _holds(conditions.get("Fallback")):
        yield f"KEDA gets no answer of {asked}, and keeps to its fallback"
    elif deployment["spec"].get("replicas") == 0 and scaled["spec"].get("minReplicaCount") == 0:
        yield "no request for a while, so KEDA keeps no replica; the next one brings it back"


def _holds(condition: Json | None) -> bool:
    return condition is not None and condition["status"] == "True"


def _say(autoscaler: Json, triggers: list[Json]) -> Iterator[str]:
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
    seen = ", ".join(_metrics(spec, status, triggers)) or "no measurement yet"
    current, wanted = status.get("currentReplicas", 0), status.get("desiredReplicas", 0)
    yield f"autoscaler: {seen}; {current} of {least} to {most} replicas" + (
        f", wants {wanted}" if wanted != current else ""
    )
    limited, able = conditions.get("ScalingLimited"), conditions.get("AbleToScale")
    if limited and limited["status"] == "True" and limited.get("reason") == "TooManyReplicas":
        yield f"the autoscaler would have more and may not: max_replicas is {most}"
    if able and able["status"] == "False":
        yield f"the autoscaler cannot scale: {able.get('message', '')}"


def _metrics(spec: Json, status: Json, triggers: list[Json]) -> Iterator[str]:
    """`slipway_serve_requests_in_flight 3 a replica (8 wanted)`."""
    found = {_name(metric): metric for metric in entries(status, "currentMetrics") if _name(metric)}
    for metric in entries(spec, "metrics"):
        name, target = _name(metric), _amount(section(_body(metric), "target"))
        current = _amount(section(_body(found[name]), "current")) if name in found else None
        yield f"{_meaning(name, triggers)} {'not measured' if current is None else current} ({target} wanted)"


def _meaning(name: str, triggers: list[Json]) -> str:
    """What is measured: KEDA's `s0-prometheus` is what its first trigger asks Prometheus for."""
    of_keda = _OF_KEDA.match(name)
    if of_keda and int(of_keda[1]) < len(triggers):
        series = _SERIES.search(section(triggers[int(of_keda[1])], "metadata").get("query", ""))
        return f"{series[0]} by KEDA" if series else name
    return name


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
