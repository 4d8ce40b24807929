"""Rules for objects that others wrote: each finds what it is for, is silent about what is right, and never fails on junk."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.checks import CODES, MANIFEST_CHECKS, SET_CHECKS, check_manifests, codes_of
from infra.checks.manifests import EMITTED
from infra.render import run

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]

GPU_SERVER = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "server", "namespace": "ml"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "server", "tier": "gpu"}},
        "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "template": {
            "metadata": {"labels": {"app": "server", "tier": "gpu"}},
            "spec": {
                "securityContext": {"runAsNonRoot": True},
                "terminationGracePeriodSeconds": 90,
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "containers": [
                    {
                        "name": "vllm",
                        "image": "vllm/vllm-openai:v0.20.0",
                        "resources": {"requests": {"nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "1"}},
                        "lifecycle": {"preStop": {"sleep": {"seconds": 10}}},
                        "livenessProbe": {"httpGet": {"path": "/health", "port": 8000}},
                        "startupProbe": {"httpGet": {"path": "/health", "port": 8000}, "failureThreshold": 60},
                    }
                ],
            },
        },
    },
}
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "train", "namespace": "ml"},
    "spec": {"template": GPU_SERVER["spec"]["template"], "podFailurePolicy": {"rules": []}},
}
METRIC = {"metric": {"name": "slipway_serve_requests_in_flight"}, "target": {"averageValue": "24"}}
SCALER = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "server", "namespace": "ml"},
    "spec": {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "other"},
        "minReplicas": 2,
        "maxReplicas": 8,
        "metrics": [{"type": "Pods", "pods": METRIC}],
    },
}
BUDGET = {
    "apiVersion": "policy/v1",
    "kind": "PodDisruptionBudget",
    "metadata": {"name": "server", "namespace": "ml"},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "server"}}},
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "server", "namespace": "ml"},
    "spec": {"selector": {"app": "server", "tier": "gpu"}},
}
OBJECTS: list[Json] = json.loads(json.dumps([GPU_SERVER, JOB, SCALER, BUDGET, SERVICE]))  # which share nothing
CONTAINER = "spec.template.spec.containers.0"

CACHE = {"metric": {"name": "vllm:kv_cache_usage_perc"}, "target": {"averageValue": "1200m"}}

# code, index of the object, path, value (... removes the key), words of the message
CASES: list[tuple[str, int, str, Any, str]] = [
    ("SLW111", 0, f"{CONTAINER}.resources.limits", ..., "requests 1 of nvidia.com/gpu, and its limit is not set"),
    ("SLW111", 0, f"{CONTAINER}.resources.limits", {"nvidia.com/gpu": 4}, "its limit is 4"),
    ("SLW311", 0, "spec.template.spec.tolerations", ..., "asks for 1 GPUs and tolerates no taint"),
    ("SLW312", 4, "spec.selector.tier", "gpus", "selects tier=gpus, which no pod has; Deployment/ml/server"),
    ("SLW411", 2, "spec.scaleTargetRef.name", "server", "replicas: 2 is written, and HorizontalPodAutoscaler/ml/server"),
    ("SLW412", 2, "spec.metrics.0.pods.metric.name", "slipway_serve_request_in_flight", "which nothing emits"),
    ("SLW413", 2, "spec.metrics.0.pods", CACHE, "passes 1.2, and it never passes 1"),
    ("SLW511", 0, f"{CONTAINER}.startupProbe", ..., "is killed 30 s after its start unless it answers"),
    ("SLW512", 0, f"{CONTAINER}.lifecycle.preStop.sleep.seconds", 90, "sleeps 90 s before SIGTERM, and the pod is killed after 90 s"),
    ("SLW513", 3, "spec", {"maxUnavailable": 0, "selector": {}}, "no node under its pods can be drained"),
    ("SLW513", 3, "spec.minAvailable", "100%", "no node under its pods can be drained"),
    ("SLW514", 0, "spec.strategy", ..., "starts 1 pod with 1 GPUs more before it stops one"),
    ("SLW515", 1, "spec.podFailurePolicy", ..., "evictions use up its 6 tries"),
    ("SLW516", 3, "spec.minAvailable", 2, "minAvailable: 2, and Deployment/ml/server may have 2"),
    ("SLW602", 0, f"{CONTAINER}.image", "vllm/vllm-openai", "is whatever was pushed last"),
    ("SLW602", 0, f"{CONTAINER}.image", "localhost:5000/vllm:latest", "is whatever was pushed last"),
    ("SLW611", 0, "spec.template.spec.securityContext", ..., "may run as root"),
    ("SLW611", 0, f"{CONTAINER}.securityContext", {"privileged": True}, "is privileged"),
]  # fmt: skip


def with_value(index: int, path: str, value: Any) -> list[Json]:
    objects = copy.deepcopy(OBJECTS)
    node: Any = objects[index]
    *keys, last = path.split(".")
    for key in keys:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return objects


def test_what_is_right_has_no_findings() -> None:
    assert check_manifests(OBJECTS) == ()
    assert check_manifests([{"kind": "List", "items": OBJECTS}]) == ()


@pytest.mark.parametrize(("code", "index", "path", "value", "says"), CASES, ids=[case[0] for case in CASES])
def test_rule_finds_what_it_is_for_and_nothing_else(code: str, index: int, path: str, value: Any, says: str) -> None:
    (finding,) = check_manifests(with_value(index, path, value))
    assert finding.code == code
    assert says in finding.message
    assert finding.fix
    assert finding.where.split("/")[:2] == [OBJECTS[index]["kind"] if code != "SLW411" else "Deployment", "ml"]


def test_every_rule_has_a_case_and_a_meaning() -> None:
    codes = {code for rule in (*MANIFEST_CHECKS, *SET_CHECKS) for code in codes_of(rule)}
    assert codes == {case[0] for case in CASES}
    assert codes <= CODES.keys()


def test_a_default_surge_that_replaces_within_what_is_there_is_left_alone() -> None:
    """With four replicas a quarter may be missing: the roll-out goes on without a spare GPU."""
    objects = with_value(0, "spec.strategy", ...)
    objects[0]["spec"]["replicas"] = 4
    assert check_manifests(objects) == ()


def test_severities_can_be_set_by_code() -> None:
    objects = with_value(0, f"{CONTAINER}.image", "vllm/vllm-openai")
    assert [finding.severity for finding in check_manifests(objects, severities={"SLW602": "error"})] == ["error"]
    assert check_manifests(objects, severities={"SLW602": "off"}) == ()


def test_what_slipway_renders_is_clean(stack_path: Path) -> None:
    manifests = run(stack_path).manifests
    assert len(manifests) > 30
    assert check_manifests(manifests) == ()


def test_metrics_that_may_be_scaled_on_are_those_of_the_contract() -> None:
    contract = (ROOT / "docs" / "contracts.md").read_text()
    assert [name for name in EMITTED if f"`{name}" not in contract] == []


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, len(OBJECTS) - 1), where=st.integers(0, 200), value=junk)
def test_no_form_of_an_object_makes_a_rule_fail(index: int, where: int, value: Any) -> None:
    """Any part of an object replaced by anything: there may be findings, and never an exception."""
    objects = copy.deepcopy(OBJECTS)
    places = list(_places(objects[index]))
    node, key = places[where % len(places)]
    node[key] = value
    check_manifests(objects)


def _places(node: Any) -> Any:
    keys = range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])
