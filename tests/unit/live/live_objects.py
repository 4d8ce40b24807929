"""Kubernetes objects as an API server gives them, cut down to what is read; messages are scheduler's, kubelet's and controllers'."""

from typing import Any

from infra.live import Snapshot

Json = dict[str, Any]
LABELS = {
    "app.kubernetes.io/part-of": "slipway",
    "app.kubernetes.io/component": "serve",
    "app.kubernetes.io/instance": "chat",
}
GANG = {
    "app.kubernetes.io/part-of": "slipway",
    "app.kubernetes.io/component": "train",
    "app.kubernetes.io/instance": "train-pylib-1",
    "batch.kubernetes.io/job-completion-index": "0",
}


def pod(name: str = "chat-0", *, labels: Json | None = None, phase: str = "Pending", **status: Any) -> Json:
    container = {
        "name": "serve",
        "image": "registry.example/serving:abc",
        "resources": {"requests": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "8"}},
        "ports": [{"name": "http", "containerPort": 8000}],
    }
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "labels": LABELS if labels is None else labels,
        },
        "spec": {"containers": [container], "nodeSelector": {"slipway.dev/pool": "serve"}},
        "status": {"phase": phase, **status},
    }


def unscheduled(message: str, **more: Any) -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(conditions=[condition], **more)


def placed(one: Json) -> Json:
    return one | {"spec": one["spec"] | {"nodeName": "node-a"}}


def waiting(reason: str, message: str = "", *, restarts: int = 0, last: Json | None = None) -> Json:
    """A pod on a node whose container waits."""
    container = {
        "name": "serve",
        "image": "registry.example/serving:abc",
        "restartCount": restarts,
        "state": {"waiting": {"reason": reason, "message": message}},
        "lastState": {"terminated": last} if last else {},
    }
    return placed(pod(containerStatuses=[container]))


def running(name: str = "chat-0", *, ready: bool = True, labels: Json | None = None) -> Json:
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True" if ready else "False"}]
    container = {"name": "serve", "restartCount": 0, "state": {"running": {"startedAt": "2026-11-21T10:00:00Z"}}}
    return placed(pod(name, labels=labels, phase="Running", conditions=conditions, containerStatuses=[container]))


def deployment(*, wanted: int = 2, **status: Any) -> Json:
    whole = {
        "observedGeneration": 3,
        "replicas": wanted,
        "updatedReplicas": wanted,
        "readyReplicas": wanted,
        "conditions": [],
    }
    return {
        "metadata": {"name": "chat", "uid": "uid-chat", "generation": 3, "labels": LABELS},
        "spec": {"replicas": wanted, "selector": {"matchLabels": LABELS}, "progressDeadlineSeconds": 900},
        "status": whole | status,
    }


def job(*, completions: int = 1, **status: Any) -> Json:
    selector = {"matchLabels": {"app.kubernetes.io/instance": "train-pylib-1"}}
    return {
        "metadata": {"name": "train-pylib-1", "uid": "uid-job", "creationTimestamp": "2026-11-21T10:00:00Z"},
        "spec": {"completions": completions, "parallelism": completions, "selector": selector},
        "status": status,
    }


def event(thing: Json, reason: str, message: str) -> Json:
    return {
        "metadata": {"name": f"e-{reason}", "creationTimestamp": "2026-11-21T10:00:00Z"},
        "involvedObject": {"uid": thing["metadata"]["uid"], "name": thing["metadata"]["name"]},
        "reason": reason,
        "message": message,
        "lastTimestamp": "2026-11-21T10:01:00Z",
    }


def claim(name: str, phase: str) -> Json:
    return {"metadata": {"name": name, "uid": f"uid-{name}"}, "spec": {}, "status": {"phase": phase}}


def autoscaler(
    *, measured: str | None = "3500m", current: int = 2, desired: int = 2, conditions: list[Json] | None = None
) -> Json:
    body = {"metric": {"name": "slipway_serve_requests_in_flight"}}
    metric = {"type": "Pods", "pods": body | {"target": {"type": "AverageValue", "averageValue": "8"}}}
    now = {"type": "Pods", "pods": body | {"current": {"averageValue": measured}}}
    return {
        "metadata": {"name": "chat"},
        "spec": {
            "scaleTargetRef": {"kind": "Deployment", "name": "chat"},
            "minReplicas": 1,
            "maxReplicas": 3,
            "metrics": [metric],
        },
        "status": {
            "currentReplicas": current,
            "desiredReplicas": desired,
            "currentMetrics": [now] if measured else None,
            "conditions": conditions or [{"type": "ScalingActive", "status": "True", "reason": "ValidMetricFound"}],
        },
    }


def scaled_object(*, least: int = 1, ready: Json | None = None, **conditions: str) -> Json:
    """KEDA's; `conditions` by type."""
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": "http://prometheus-operated.monitoring:9090",
            "query": 'sum(slipway_serve_requests_in_flight{namespace="ns", inference_service="chat"})',
        },
    }
    told = [{"type": "Ready", "status": "True"} | (ready or {})]
    return {
        "metadata": {"name": "chat"},
        "spec": {"scaleTargetRef": {"name": "chat"}, "minReplicaCount": least, "triggers": [trigger]},
        "status": {"conditions": [*told, *({"type": kind, "status": status} for kind, status in conditions.items())]},
    }


def keda_autoscaler(*, measured: str = "3500m") -> Json:
    """What KEDA makes of it."""
    body = {"metric": {"name": "s0-prometheus"}}
    metric = {"type": "External", "external": body | {"target": {"type": "AverageValue", "averageValue": "8"}}}
    now = {"type": "External", "external": body | {"current": {"averageValue": measured}}}
    plain = autoscaler()
    return plain | {
        "metadata": {"name": "keda-hpa-chat"},
        "spec": plain["spec"] | {"metrics": [metric]},
        "status": plain["status"] | {"currentMetrics": [now]},
    }


def seen(*pods: Json, **more: Any) -> Snapshot:
    return Snapshot(pods=list(pods), **more)
