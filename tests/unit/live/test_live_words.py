"""Drift as differences between objects, logs by what a person calls their pods, and where the router is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.live.drift import MOST_SHOWN, changes
from infra.live.endpoint import port_of, published
from infra.live.logs import chosen

from . import live_objects as k8s

# A null is what is absent, to Kubernetes.
values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def thing(spec: Any, **metadata: Any) -> dict[str, Any]:
    return {"kind": "Deployment", "metadata": {"name": "chat", **metadata}, "spec": spec, "status": {"replicas": 1}}


@given(values)
def test_what_is_as_declared_differs_in_nothing(spec: Any) -> None:
    live = thing(spec, resourceVersion="1", managedFields=[{"manager": "x"}], generation=2)
    declared = thing(spec, resourceVersion="2", generation=3) | {"status": {}}
    assert changes(live, declared) == []


@given(values, values)
def test_what_differs_is_told(one: Any, other: Any) -> None:
    assert bool(changes(thing(one), thing(other))) == (one != other)


def test_a_difference_names_the_path_and_both_values() -> None:
    live = thing({"replicas": 5, "template": {"containers": [{"image": "a:1"}]}})
    declared = thing({"replicas": 2, "template": {"containers": [{"image": "a:2"}]}})
    assert changes(live, declared) == [
        "spec.replicas: 5, declared 2",
        "spec.template.containers[0].image: a:1, declared a:2",
    ]
    many = changes(thing({str(n): n for n in range(20)}), thing({}))
    assert (len(many), many[-1]) == (MOST_SHOWN + 1, f"and {20 - MOST_SHOWN} more")


@pytest.mark.parametrize("name", ["serve", "chat", "chat-0"])
def test_logs_are_found_by_component_service_and_pod(name: str) -> None:
    server, trainer = k8s.running("chat-0"), k8s.running("train-0", labels=k8s.GANG)
    stranger = k8s.running("other", labels={"app.kubernetes.io/component": "serve"})
    assert chosen(k8s.seen(server, trainer, stranger), name) == [server]
    assert chosen(k8s.seen(server, trainer, stranger), None) == [server, trainer]


def test_logs_of_nothing_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="no pods of 'promote'; there is serve"):
        chosen(k8s.seen(k8s.running("chat-0")), "promote")


def test_a_router_is_reached_by_its_load_balancer_or_by_its_port() -> None:
    service = {"spec": {"ports": [{"port": 8080}]}, "status": {"loadBalancer": {}}}
    assert published(service) is None
    service["status"] = {"loadBalancer": {"ingress": [{"hostname": "lb.example"}]}}
    assert published(service) == "http://lb.example:8080"
    assert port_of(k8s.running()) == 8000
